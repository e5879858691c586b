"""``mixmask bench``: how fast this machine is at the work of this project, and what limits it."""
