"""Texts in CSV files, which spreadsheets may take for formulas."""

from __future__ import annotations

import re
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of a formula


def safe_cell(value: Any) -> Any:
    """A text that a spreadsheet shows and does not carry out: an apostrophe stands before a formula's first character."""
    if not isinstance(value, str) or not value.startswith(FORMULA):
        return value
    return value if re.fullmatch(r"[+-][0-9][0-9.,]*", value) else f"'{value}"
