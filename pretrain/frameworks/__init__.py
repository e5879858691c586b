"""One module per self-supervised framework."""
