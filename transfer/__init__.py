"""Transfer: checkpoints in and out, classification and detection protocols on a given backbone."""
