"""Text from outside (names, keys, messages of other programs), made safe to show."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, direction, surrogate, private, unassigned, line breaks


def printable(text: str) -> str:
    """The text with line breaks, control and text-direction characters replaced by their hexadecimal codes."""
    return "".join(f"\\x{ord(one):02x}" if unicodedata.category(one) in HIDDEN else one for one in text)


def printable_lines(text: str) -> str:
    """Like `printable`, but line breaks are kept."""
    return "\n".join(map(printable, text.split("\n")))


def did_you_mean(given: object, valid: Iterable[str], most: int = 1) -> str:
    """``Did you mean 'grid'?``, or nothing if no valid name is near what was given."""
    near = difflib.get_close_matches(str(given), list(valid), n=most)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else ""


def closest_first(given: object, valid: Iterable[str]) -> list[str]:
    """All valid names; up to three that resemble what was given come first."""
    names = list(valid)
    near = difflib.get_close_matches(str(given), names, n=3)
    return [*near, *(name for name in names if name not in near)]


def nearest_multiples(value: int, of: int) -> str:
    """A hint for a ``value`` that is not a multiple of ``of``: ``valid: 48, 64, …``."""
    near = max(value // of, 1) * of
    return f"valid: {near}, {near + of}, …"
