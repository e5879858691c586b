"""``python -m mixmask`` is the command ``mixmask``."""

from mixmask.launch.commands.app import main

main()
