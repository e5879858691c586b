"""The parts of ``mixmask bench``, one per module."""
