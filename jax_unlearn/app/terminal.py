"""Text from files and names on the terminal, where it must not act."""

import re
import sys
from typing import TextIO

__all__ = ["printable", "say"]

# What moves the cursor, colours, rings, or reorders a line: C0 but tab and newline, DEL, C1, marks
# of direction, separators of lines; and halves of surrogate pairs, which no terminal can be sent.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""A text whose control characters are shown, not sent; newline, tab and all else stay.

    Example:
      >>> print(printable("a\x1b[31mred\u202e é"))
      a\x1b[31mred\u202e é
    """
    return _ACTING.sub(lambda match: ascii(match[0])[1:-1], text)


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a text, made printable, at once.

    Args:
      text: what to print.
      file: where to; default standard error. What its encoding lacks is shown escaped.
    """
    file = sys.stderr if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    shown = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=file, flush=True)
