"""What the reader of a stream can be shown: how many columns, and whether colour."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO


def columns(most: int = 100) -> int:
    """Columns of stdout: the terminal's, between 60 and `most`; 100 where it is none."""
    found = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 100
    return min(max(found, 60), most)


def has_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal, and `NO_COLOR` is unset or empty (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")
