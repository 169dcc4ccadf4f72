"""Docstrings are plain text: `2**n` is a power, not the beginning of bold type. Escapes what Markdown would take for marks.

What is in backticks stays as it is, and so do lists and indented code.
"""

import re
from typing import Any

import griffe

# In order: code spans, left alone; stars, underscores, square and angle brackets, escaped.
_MARKS = re.compile(r"(`[^`]*`)|([*_\[\]])|(<)")


def escape(text: str) -> str:
    """The text with every mark outside of code made a plain character."""
    return _MARKS.sub(lambda match: match[1] or (f"\\{match[2]}" if match[2] else "&lt;"), text)


class PlainDocstrings(griffe.Extension):
    """Escapes each docstring once, as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            lines = obj.docstring.value.split("\n")
            obj.docstring.value = "\n".join(line if _is_code(line) else escape(line) for line in lines)


def _is_code(line: str) -> bool:
    """Whether a line is an indented command, as in the docstrings of command lines and experiments."""
    return line.startswith("    python ")
