"""`report.label_placement` and `report.plots`: labels that can be read, and the front that no run
beats.
"""

import itertools

import numpy as np
import pytest
from matplotlib.text import Text

from quweit_jax.report import figures, label_placement, plots


def crowd(seed, count, spread):
    """Points in clusters, with names of differing length."""
    draw = np.random.default_rng(seed)
    centres = draw.uniform(0, 1, (3, 2))
    points = [tuple(centres[i % 3] + spread * draw.normal(size=2)) for i in range(count)]
    return points, [
        [f"{i} run-of-some-name-{'x' * (i % 7)}", f"{i} run", str(i)] for i in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("seed", "count", "spread"),
    [(0, 3, 0.2), (1, 8, 0.05), (2, 14, 0.1), (3, 20, 0.15), (4, 6, 0.0)],
)
def test_labels_overlap_nothing(seed, count, spread):
    points, names = crowd(seed, count, spread)
    with figures.style():
        figure, axes = figures.new(3.9)
        axes.plot(*zip(*points), "o")
        axes.set(xlim=(-0.5, 1.5), ylim=(-0.5, 1.5))
        figure.canvas.draw()
        figure.set_layout_engine("none")
        written = label_placement.place(axes, points, names, ["#000000"] * count)
        renderer = figure.canvas.get_renderer()
        boxes = [letters(label, renderer) for label in written]
        inside = axes.get_window_extent(renderer)
    for (i, a), (j, b) in itertools.combinations(enumerate(boxes), 2):
        assert label_placement.overlap(a, b) == 0, (written[i], written[j])
    for box, (x, y) in itertools.product(boxes, axes.transData.transform(points)):
        assert not (box.x0 < x < box.x1 and box.y0 < y < box.y1)
    assert all(
        inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        for box in boxes
    )
    assert [label.get_text() in name for label, name in zip(written, names)] == [True] * count


def letters(label, renderer):
    """The extent of a label without its line."""
    label.update_positions(renderer)
    return Text.get_window_extent(label, renderer)


@pytest.mark.parametrize("larger", [True, False])
def test_front_against_every_pair(larger):
    draw = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in draw.integers(0, 12, (40, 2))]

    def beats(a, b):
        better = (lambda p, q: p >= q) if larger else (lambda p, q: p <= q)
        return a != b and a[0] <= b[0] and better(a[1], b[1])

    expected = {i for i, p in enumerate(points) if not any(beats(q, p) for q in points)}
    found = plots.front(points, larger)
    assert set(found) == expected and [points[i][0] for i in found] == sorted(
        points[i][0] for i in found
    )


def test_numbers_for_axes():
    assert [plots.number(v) for v in (0, 0.5, 999, 1234567, 2.5e9, 3e12)] == [
        "0",
        "0.5",
        "999",
        "1.23 M",
        "2.5 G",
        "3 T",
    ]
    assert (
        figures.shortened("a" * 40) == "a" * 11 + "…" + "a" * 12
        and figures.shortened("short") == "short"
    )
