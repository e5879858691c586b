"""The two engines that train and evaluate a detector: Detectron2, and torchvision's operators."""
