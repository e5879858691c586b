"""``mixmask estimate``: what a suite will take, and what bounds it."""
