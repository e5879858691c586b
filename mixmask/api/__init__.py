"""The Python API, for notebooks and other people's code: `mixmask.__all__` names what is promised to stay."""

from __future__ import annotations

import os

Place = str | os.PathLike[str]
