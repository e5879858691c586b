"""Checkpoints in (any known layout) and out (Detectron2, torchvision, timm), with an account of every tensor."""
