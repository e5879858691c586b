"""Checkpoints in (any known layout) and out (Detectron2, torchvision, timm), with a report on every tensor."""
