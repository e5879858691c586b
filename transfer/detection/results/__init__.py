"""What a detector has found: metrics, files, pictures."""
