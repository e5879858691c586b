"""Semantic segmentation: data sets, a dilated trunk with an FCN head, training and evaluation."""
