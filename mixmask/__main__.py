"""``python -m mixmask`` is the command ``mixmask``."""

from mixmask.launch.cli import main

main()
