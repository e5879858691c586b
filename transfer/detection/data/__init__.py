"""Pictures with boxes and outlines: VOC devkits and COCO json."""
