"""Text from outside (names, keys, messages of other programs), made safe to show."""

from __future__ import annotations

import unicodedata

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, direction, surrogate, private, unassigned, line breaks


def printable(text: str) -> str:
    """A text without line breaks, control and direction characters, which are shown as their codes."""
    return "".join(f"\\x{ord(one):02x}" if unicodedata.category(one) in HIDDEN else one for one in text)


def printable_lines(text: str) -> str:
    """As `printable`, for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))
