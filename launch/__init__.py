"""Top floor: the command line, the demo, and what runs the stages one after another."""
