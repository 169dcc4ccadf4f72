"""How plots look, everywhere: the colors, and which kind of model or of layer has which.

A kind has one color in every plot, in reports, run directories and studies; the runs of a kind
differ by their lines and markers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

# (on a light page, on a dark page)
SERIES = (
    ("#2360c4", "#7fabff"),  # blue
    ("#b8420e", "#ff9d6b"),  # orange
    ("#157a3c", "#62d28c"),  # green
    ("#9a1fa6", "#e794f2"),  # magenta
    ("#0d6f88", "#55cfe0"),  # cyan
    ("#7d6300", "#e2c452"),  # yellow
    ("#b0202e", "#ff8d92"),  # red
    ("#55514c", "#c9c1b8"),  # gray
    ("#5b3fb8", "#b8a3ff"),  # violet
    ("#3d6b00", "#a5d84f"),  # olive
    ("#8c3b63", "#f09bc4"),  # pink
    ("#00705f", "#4ed6bd"),  # teal
)
# Places in SERIES. The name of a model alone is the model with dense channel mixers.
_KINDS = {
    "lookup_glu": 0,
    "dense": 1,
    "weightless": 2,
    "swiglu": 3,
    "bitglu": 4,
    "transformer_pp": 5,
    "matmulfree": 6,
    "none": 7,
    "matmulfree lookup_glu": 8,
    "dwn": 9,
    "matmulfree weightless": 10,
    "vector_tables": 11,
    "one_bit_tables": 11,
}
# Other names of theirs in studies.
_ALIASES = {"gpt": "dense", "quweit": "weightless", "integer": "dense"}
_LAYERS = (
    *("lookup", "mlp", "conditional_sum", "attention", "projection", "recurrence", "embedding"),
    *("residual", "head", "norm", "requantize", "thermometer", "activation"),
)
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def kind_of(model: Mapping[str, Any]) -> str:
    """The kind of a run's `config.model`, as `color_of_kind` knows it."""
    name, mlp = str(model.get("name", "")), str(model.get("mlp", "dense"))
    if name in ("gpt", "vit"):
        return mlp
    return name if mlp == "dense" else f"{name} {mlp}"


def color_of_kind(kind: str) -> int | None:
    """The place in SERIES of a kind of model, also by a study's name for it ('lookup_glu_320',
    'matmulfree_weightless'); None for what is not known.
    """
    for known, place in sorted(_KINDS.items(), key=lambda item: -len(item[0])):
        if kind.replace("_", " ").startswith(known.replace("_", " ")):
            return place
    first, _, rest = kind.replace("+", " ").replace("_", " ").partition(" ")
    if first == "integer" and rest.strip():  # what it is in integers
        return color_of_kind(rest.strip())
    return _KINDS[_ALIASES[first]] if first in _ALIASES else None


def color_of_layer(kind: str) -> int:
    """The place in SERIES of a kind of layer."""
    return (_LAYERS.index(kind) if kind in _LAYERS else len(_LAYERS)) % len(SERIES)


def style(kind: str, number: int) -> dict[str, Any]:
    """Color (of a light page), line and marker of the number-th of several things in a plot, which
    is of this kind; of one that is not known the color goes by the number, too.
    """
    place = color_of_kind(kind)
    return _look(number % len(SERIES) if place is None else place, number)


def styles(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Those of several curves: those of one color have markers of their own, and those of no known
    kind colors that no other has, as far as there are enough.
    """
    known = [color_of_kind(kind) for kind in kinds]
    left = [place for place in range(len(SERIES)) if place not in known] or [*range(len(SERIES))]
    unknown = itertools.cycle(left)
    places = [next(unknown) if place is None else place for place in known]
    return [_look(place, places[:i].count(place)) for i, place in enumerate(places)]


def _look(place: int, number: int) -> dict[str, Any]:
    return {
        "color": SERIES[place][0],
        "linestyle": LINES[number // len(MARKERS) % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
    }
