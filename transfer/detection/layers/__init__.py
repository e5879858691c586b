"""The parts of detectors, on torchvision's operators."""
