"""One YAML file per publisher."""
