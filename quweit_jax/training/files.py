"""Files that are whole or not there, whenever the program is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Writes UTF-8 text beside the file, then puts it in its place."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def replace_json(path: Path, value: Any) -> None:
    """The same for a JSON value."""
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
