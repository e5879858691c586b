"""The Python API, for notebooks and your own code. The names in `mixmask.__all__` are stable."""

from __future__ import annotations

import os

Place = str | os.PathLike[str]
