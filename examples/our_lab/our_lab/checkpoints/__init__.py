"""Checkpoints that this lab publishes: every YAML file here is a publisher."""
