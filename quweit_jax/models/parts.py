"""Projections that some models have in one piece and others, such as ternary ones of which each
part has its own scale, in several.
"""

from __future__ import annotations

# The whole's name, and its parts' side by side in order, of which one may have the same name.
PARTS = {"qkv": ("query", "key", "value"), "gate": ("gate", "up")}
