"""Labels beside points that overlap neither one another nor the points.

Places are tried in a fixed order and the first free one is taken; where a name fits nowhere a
shorter one is tried. Our own: adjustText 1.4 leaves overlaps among 14 labels, and differs each
time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from quweit_jax.errors import needed

with needed("for reports"):
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox


Point: TypeAlias = tuple[float, float]
_ANGLES = (45, 135, -45, -135, 0, 180, 90, -90)
_DISTANCES = (10, 15, 23, 33, 45, 58)  # points
_MARKER = 7.0  # half the side of a marker with its ring, points
_SIZE = 9.5  # of the letters, points


class _Place(NamedTuple):
    covered: float  # pixels of what else is there
    offset: Point
    alignment: tuple[str, str]
    box: Bbox


def place(
    axes: Axes,
    points: Sequence[Point],
    names: Sequence[Sequence[str]],
    colors: Sequence[str],
    lines: Sequence[Sequence[Point]] = (),
) -> list[Annotation]:
    """Writes a label beside each point, with a line to it where it stands far off.

    Args:
      axes: of a figure whose layout is fixed, as labels are placed in pixels.
      points: in data coordinates. names: for each point, the most wanted first.
      colors: of each point's label.
      lines: drawn between points, to be kept clear of too.

    Returns:
      The labels, in the points' order. Where nothing fits, the shortest name stands where it covers
      least.
    """
    scale = axes.figure.dpi / 72
    pixels = [tuple(axes.transData.transform(point)) for point in points]
    taken = [_square(x, y, _MARKER * scale) for x, y in pixels]
    for line in lines:
        taken += _along([tuple(axes.transData.transform(point)) for point in line], 2.0 * scale)
    labels: dict[int, Annotation] = {}
    # Points with many neighbors choose first: the others have more room.
    for i in sorted(
        range(len(points)),
        key=lambda i: -sum(math.dist(pixels[i], other) < 90 * scale for other in pixels),
    ):
        for name in names[i]:
            found = _search(axes, points[i], name, taken)
            if not found.covered:
                break
        look: dict[str, Any] = {"ha": found.alignment[0], "va": found.alignment[1]}
        if math.hypot(*found.offset) > 16:
            line = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            look["arrowprops"] = line | {"color": colors[i]}
        labels[i] = _write(axes, name, points[i], found.offset, color=colors[i], **look)
        taken.append(found.box)
    return [labels[i] for i in range(len(points))]


def _write(axes: Axes, name: str, point: Point, offset: Point, **look: Any) -> Annotation:
    look |= {"textcoords": "offset points", "fontsize": _SIZE, "annotation_clip": False}
    return axes.annotate(name, point, xytext=offset, **look)


def _square(x: float, y: float, reach: float) -> Bbox:
    return Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)


def _along(line: Sequence[Point], reach: float) -> list[Bbox]:
    """Small boxes that cover a line."""
    boxes = []
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        steps = max(1, math.ceil(math.dist((x0, y0), (x1, y1)) / reach))
        for k in range(steps + 1):
            x, y = x0 + (x1 - x0) * k / steps, y0 + (y1 - y0) * k / steps
            boxes.append(_square(x, y, reach / 2))
    return boxes


def _search(axes: Axes, point: Point, name: str, taken: Sequence[Bbox]) -> _Place:
    """The first place beside a point where a name covers nothing and stays within the plot, or
    where it covers least.
    """
    label = _write(axes, name, point, (0, 0))
    size = label.get_window_extent()
    label.remove()
    scale, inside = axes.figure.dpi / 72, axes.get_window_extent()
    left, low = axes.transData.transform(point)
    best = _Place(math.inf, (0, 0), ("center", "center"), Bbox.null())
    for distance, angle in itertools.product(_DISTANCES, map(math.radians, _ANGLES)):
        x, y = distance * math.cos(angle), distance * math.sin(angle)
        (across, dx), (along, dy) = _aligned(x, "left", "right"), _aligned(y, "bottom", "top")
        corner = left + x * scale - dx * size.width, low + y * scale - dy * size.height
        box = Bbox.from_bounds(*corner, size.width, size.height).padded(1.5)
        outside = max(0.0, box.width * box.height - overlap(box, inside))
        covered = sum(overlap(box, other) for other in taken) + outside
        if covered < best.covered - 1e-6:
            best = _Place(covered if covered > 1e-6 else 0.0, (x, y), (across, along), box)
        if not best.covered:
            break
    return best


def _aligned(offset: float, before: str, after: str) -> tuple[str, float]:
    """Which side of a label faces its point, and how much of the label lies before that side."""
    return (before, 0.0) if offset > 1 else (after, 1.0) if offset < -1 else ("center", 0.5)


def overlap(a: Bbox, b: Bbox) -> float:
    """The area that two boxes share."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)
