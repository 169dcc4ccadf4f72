"""The plots of what look-up tables learned, a line or a bar for each look-up layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quweit_jax.errors import needed
from quweit_jax.report import figures
from quweit_jax.report.figures import GRID, MUTED, SERIES, Picture
from quweit_jax.report.insight import KINDS, Insight, LayerInsight
from quweit_jax.training import looks

with needed("for reports"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

KIND_WORDS = {
    "constant": "constant",
    "copy": "copies one input",
    "threshold": "linear threshold",
    "other": "any other",
}


@figures.style()
def insight_pictures(insight: Insight, name: str) -> list[Picture]:
    """Kinds of functions, reads of inputs, thresholds where there are several, and, where there was
    data, balance of bits and tables that could be dropped.
    """
    pictures = [_kinds(insight.layers, f"{name}-kinds"), _reads(insight.layers, f"{name}-reads")]
    if several := [layer for layer in insight.layers if layer.thresholds > 1]:
        pictures.append(_thresholds(several, f"{name}-thresholds"))
    if watched := [layer for layer in insight.layers if layer.balance is not None]:
        pictures += [_balance(watched, f"{name}-balance"), _kept(watched, f"{name}-kept")]
    return pictures


def _bars(
    layers: Sequence[LayerInsight], parts: Sequence[tuple[str, str, Sequence[float]]]
) -> Figure:
    """Stacked bars from 0 to 100 %, one a layer; parts: (name, color, share of each layer)."""
    figure, axes = figures.new(1.35 + 0.3 * len(layers))
    rows, left = range(len(layers)), np.zeros(len(layers))
    look = {"height": 0.66, "edgecolor": MUTED, "linewidth": 0.6}
    for label, color, shares in parts:
        widths = 100 * np.asarray(shares, float)
        axes.barh(rows, widths, left=left, facecolor=color, label=label, **look)
        left += widths
    axes.set_yticks(rows, [figures.shortened(layer.name, 20) for layer in layers])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of the tables")
    axes.grid(axis="y", visible=False)
    figures.legend(figure, handlelength=1.2)
    return figure


def _new(height: float, layers: Sequence[LayerInsight]) -> tuple[Figure, Axes]:
    """A figure with room for a legend of all layers."""
    return figures.new(height + 0.2 * -(-len(layers) // 2))


def _stairs(
    axes: Axes, layers: Sequence[LayerInsight], heights: Sequence[np.ndarray], edges: np.ndarray
) -> None:
    """A histogram, in percent, for each layer."""
    for i, (layer, each) in enumerate(zip(layers, heights)):
        look = looks.style("", i)
        del look["marker"]
        axes.stairs(each, edges, label=figures.shortened(layer.name, 22), linewidth=1.5, **look)


def _kinds(layers: Sequence[LayerInsight], name: str) -> Picture:
    colors = (MUTED, SERIES[0], SERIES[1], GRID)
    parts = [
        (KIND_WORDS[kind], color, [layer.kinds[kind] / layer.tables for layer in layers])
        for kind, color in zip(KINDS, colors)
    ]
    total = sum(layer.tables for layer in layers)
    shares = ", ".join(
        f"{KIND_WORDS[kind]} {sum(layer.kinds[kind] for layer in layers) / total:.1%}"
        for kind in KINDS
    )
    text = f"Of {total} tables: {shares}. By layer in the table."
    return figures.picture(_bars(layers, parts), name, "Functions the tables compute", text)


def _reads(layers: Sequence[LayerInsight], name: str) -> Picture:
    """How many inputs are read so many times."""
    figure, axes = _new(3.2, layers)
    most = max(int(layer.reads.max()) for layer in layers)
    edges = np.arange(most + 2) if most <= 30 else np.linspace(0, most + 1, 31)
    heights = [100 * np.histogram(layer.reads, edges)[0] / len(layer.reads) for layer in layers]
    _stairs(axes, layers, heights, edges - 0.5)
    axes.set(xlabel="times an input is read", ylabel="% of the inputs")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figures.legend(figure)
    said = "; ".join(
        f"{r.name}: {int((r.reads == 0).sum())} of {len(r.reads)} inputs never, at most "
        f"{int(r.reads.max())} times"
        for r in layers
    )
    text = f"Histogram of how many slots read an input. {said}."
    return figures.picture(figure, name, "How often inputs are read", text)


def _thresholds(layers: Sequence[LayerInsight], name: str) -> Picture:
    """How much each threshold of the thermometer matters."""
    figure, axes = _new(2.8, layers)
    said = []
    for i, layer in enumerate(layers):
        mean = layer.influence.reshape(-1, layer.thresholds).mean(0)
        label, places = figures.shortened(layer.name, 22), np.arange(1, layer.thresholds + 1)
        axes.plot(places, mean, markersize=5, label=label, **looks.style("", i))
        said.append(f"{layer.name}: " + ", ".join(f"{v:.2f}" for v in mean))
    axes.set(xlabel="threshold, from the lowest", ylabel="influence of its bits")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figures.legend(figure)
    text = (
        "Influence of each threshold's bits on the tables, a mean over the features, from the "
        f"lowest threshold. {'; '.join(said)}."
    )
    return figures.picture(figure, name, "Which thresholds matter", text)


def _balance(layers: Sequence[LayerInsight], name: str) -> Picture:
    figure, axes = _new(3.2, layers)
    edges = np.linspace(0, 1, 21)
    known = [(r, r.balance) for r in layers if r.balance is not None]
    heights = [100 * np.histogram(balance, edges)[0] / r.tables for r, balance in known]
    _stairs(axes, layers, heights, edges)
    axes.set(xlabel="how often a table gives 1", ylabel="% of the tables", xlim=(0, 1))
    figures.legend(figure)
    said = "; ".join(f"{r.name}: median {np.median(balance):.2f}" for r, balance in known)
    text = f"Histogram of how often a table gives 1, of all it was asked. {said}."
    return figures.picture(figure, name, "Balance of the tables' bits", text)


def _kept(layers: Sequence[LayerInsight], name: str) -> Picture:
    kept = [(layer.kept or 0) / layer.tables for layer in layers]
    dropped = [1 - share for share in kept]
    figure = _bars(layers, [("needed", SERIES[2], kept), ("could be dropped", SERIES[6], dropped)])
    said = "; ".join(f"{r.name}: {r.tables - (r.kept or 0)} of {r.tables}" for r in layers)
    text = f"Tables without which no output on the evaluated data changes. {said}."
    return figures.picture(figure, name, "Tables that could be dropped", text)
