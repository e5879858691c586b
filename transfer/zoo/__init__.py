"""Known checkpoints: where they are published, how to get them, and what their publishers measured."""
