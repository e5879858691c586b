"""Suites: grids of work, what was launched, how far it is, and what it ends with."""
