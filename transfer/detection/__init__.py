"""Detection transfer: Faster R-CNN and Mask R-CNN with a C4 backbone."""
