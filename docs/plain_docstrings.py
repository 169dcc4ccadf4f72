"""Docstrings are plain text: `2**n` is a power, not the beginning of bold type. Escapes what
Markdown would take for marks.

What is in backticks stays as it is, and so does code: lines indented by four after an empty one.
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe

# In order: code spans, left alone; stars, square brackets, underscores but those within names, and
# angle brackets, escaped.
_MARKS = re.compile(r"(`[^`]*`)|([*\[\]]|(?<!\w)_)|(<)")


def escape(text: str) -> str:
    """The text with every mark outside of code made a plain character."""
    return "\n".join(_escaped(text.split("\n")))


def _escaped(lines: list[str]) -> Iterator[str]:
    code, after_empty = False, False
    for line in lines:
        indented = line.startswith("    ")
        code = (indented and (code or after_empty)) or (code and not line)
        after_empty = not line
        yield (
            line
            if code
            else _MARKS.sub(
                lambda match: match[1] or (f"\\{match[2]}" if match[2] else "&lt;"), line
            )
        )


class PlainDocstrings(griffe.Extension):
    """Escapes each docstring once, as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = escape(obj.docstring.value)
