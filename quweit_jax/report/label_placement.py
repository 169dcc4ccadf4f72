"""Labels beside points that overlap neither one another nor the points: places are tried in a fixed
order, the first free one is taken.

Where a name fits nowhere a shorter one is tried. Unlike pushing labels apart, this leaves no two on
top of each other while there is a free place, and gives the same picture every time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from matplotlib.transforms import Bbox

Point: TypeAlias = tuple[float, float]
_ANGLES = (45, 135, -45, -135, 0, 180, 90, -90)
_DISTANCES = (10, 15, 23, 33, 45, 58)  # points
_MARKER = 7.0  # half the side of a marker with its ring, points
_SIZE = 9.5  # of the letters, points


class _Place(NamedTuple):
    covered: float  # pixels of what else is there
    offset: tuple[float, float]
    alignment: tuple[str, str]
    box: Bbox


def place(
    axes: Any,
    points: Sequence[Point],
    names: Sequence[Sequence[str]],
    colors: Sequence[str],
    lines: Sequence[Sequence[Point]] = (),
) -> list[Any]:
    """Writes a label beside each point, with a line to it where it stands far off.

    Args:
      axes: of a figure whose layout is fixed, as labels are placed in pixels. points: in data
        coordinates.
      names: for each point what may be written, the most wanted first. colors: of each point's
        label.
      lines: drawn between points, to be kept clear of too.

    Returns:
      The labels, in the points' order. Where nothing fits, the shortest name stands where it covers
      least.
    """
    scale = axes.figure.dpi / 72
    pixels = [tuple(axes.transData.transform(point)) for point in points]
    reach = _MARKER * scale
    taken = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in pixels]
    for line in lines:
        taken += _along([tuple(axes.transData.transform(point)) for point in line], 2.0 * scale)
    labels: dict[int, Any] = {}
    # Points with many neighbors choose first: the others have more room.
    for i in sorted(
        range(len(points)),
        key=lambda i: -sum(math.dist(pixels[i], other) < 90 * scale for other in pixels),
    ):
        for name in names[i]:
            found = _search(axes, points[i], name, taken)
            if not found.covered:
                break
        across, along = found.alignment
        line = (
            {"arrowstyle": "-", "color": colors[i], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            if math.hypot(*found.offset) > 16
            else None
        )
        shared: dict[str, Any] = {
            "xytext": found.offset,
            "textcoords": "offset points",
            "fontsize": _SIZE,
            "annotation_clip": False,
        }
        labels[i] = axes.annotate(
            name, points[i], ha=across, va=along, color=colors[i], arrowprops=line, **shared
        )
        taken.append(found.box)
    return [labels[i] for i in range(len(points))]


def _along(line: Sequence[Point], reach: float) -> list[Bbox]:
    """Small boxes that cover a line."""
    boxes = []
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        steps = max(1, math.ceil(math.dist((x0, y0), (x1, y1)) / reach))
        for k in range(steps + 1):
            x, y = x0 + (x1 - x0) * k / steps, y0 + (y1 - y0) * k / steps
            boxes.append(
                Bbox.from_extents(x - reach / 2, y - reach / 2, x + reach / 2, y + reach / 2)
            )
    return boxes


def _search(axes: Any, point: Point, name: str, taken: Sequence[Bbox]) -> _Place:
    """The first place beside a point where a name covers nothing and stays within the plot, or
    where it covers least.
    """
    label = axes.annotate(
        name,
        point,
        xytext=(0, 0),
        textcoords="offset points",
        fontsize=_SIZE,
        annotation_clip=False,
    )
    size = label.get_window_extent(axes.figure.canvas.get_renderer())
    label.remove()
    scale, inside, (left, low) = (
        axes.figure.dpi / 72,
        axes.get_window_extent(),
        axes.transData.transform(point),
    )
    best = _Place(math.inf, (0, 0), ("center", "center"), Bbox.null())
    for distance in _DISTANCES:
        for angle in _ANGLES:
            x, y = (
                distance * math.cos(math.radians(angle)),
                distance * math.sin(math.radians(angle)),
            )
            (across, dx), (along, dy) = _aligned(x, "left", "right"), _aligned(y, "bottom", "top")
            box = Bbox.from_bounds(
                left + x * scale - dx * size.width,
                low + y * scale - dy * size.height,
                size.width,
                size.height,
            ).padded(1.5)
            covered = sum(overlap(box, other) for other in taken) + max(
                0.0, box.width * box.height - overlap(box, inside)
            )
            if covered < best.covered - 1e-6:
                best = _Place(covered if covered > 1e-6 else 0.0, (x, y), (across, along), box)
            if not best.covered:
                return best
    return best


def _aligned(offset: float, before: str, after: str) -> tuple[str, float]:
    """Which side of a label faces its point, and how much of the label lies before that side."""
    return (before, 0.0) if offset > 1 else (after, 1.0) if offset < -1 else ("center", 0.5)


def overlap(a: Bbox, b: Bbox) -> float:
    """The area that two boxes share."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)
