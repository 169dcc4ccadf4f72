"""The plots of a report: loss curves, accuracy against energy, loss against memory, energy by
layer, and what tables learned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from quweit_jax.report import figures
from quweit_jax.report.figures import GRID, INK, MUTED, SERIES, Picture
from quweit_jax.report.insight import KINDS, Insight, LayerInsight
from quweit_jax.report.label_placement import place
from quweit_jax.report.summary import Group, Record

_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LONGEST = 24  # letters of a name in a plot; tables have it whole
KIND_WORDS = {
    "constant": "constant",
    "copy": "copies one input",
    "threshold": "linear threshold",
    "other": "any other",
}


def shortened(text: str, longest: int = _LONGEST) -> str:
    """At most so many letters, the middle left out."""
    return text if len(text) <= longest else f"{text[: longest // 2 - 1]}…{text[-(longest // 2) :]}"


def _look(record: Record) -> dict[str, Any]:
    """Color, line and marker of a run, the same in every plot."""
    i = record.number - 1
    return {
        "color": SERIES[i % len(SERIES)],
        "linestyle": _LINES[i // len(SERIES) % len(_LINES)],
        "marker": _MARKERS[i % len(_MARKERS)],
    }


def loss_curves(group: Group, name: str) -> Picture | None:
    """Training losses (thin) and validation losses (marked) of all runs of a group; None where
    nothing was noted yet.
    """
    shown = [record for record in group.records if record.rows]
    if not shown:
        return None
    rows = -(-len(shown) // 2)
    with figures.style():
        figure, axes = figures.new(3.4 + 0.2 * rows)
        seen = []
        for record in shown:
            look = _look(record)
            for split in ("train", "validation"):
                points = [
                    (row["step"], row["loss"]) for row in record.rows if row["split"] == split
                ]
                steps, losses = [p[0] for p in points], [p[1] for p in points]
                if split == "train":
                    axes.plot(steps, losses, color=look["color"], linewidth=0.8, alpha=0.35)
                    seen += losses[len(losses) // 20 :]
                else:
                    axes.plot(
                        steps,
                        losses,
                        markersize=3.5,
                        linewidth=1.5,
                        markevery=max(1, len(steps) // 12),
                        label=shortened(record.label),
                        **look,
                    )
                    seen += losses
        finite = sorted(value for value in seen if math.isfinite(value))
        if finite:  # the first steps of a run are far above all that matters
            low, high = finite[0], finite[min(len(finite) - 1, int(0.97 * len(finite)))]
            axes.set_ylim(low - 0.04 * (high - low) - 1e-3, high + 0.04 * (high - low) + 1e-3)
        axes.set(xlabel="step", ylabel=f"loss ({loss_unit(group)})")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.legend(
            loc="outside lower center",
            ncols=1 if len(shown) == 1 else 2,
            handlelength=1.6,
            columnspacing=1.0,
        )
        best = "; ".join(
            f"{r.label}: {r.best['loss']:.3f} at step {r.best['step']}" for r in shown if r.best
        )
        return figures.picture(
            figure,
            name,
            "Loss",
            "Training and validation loss by step. Lowest validation losses: "
            f"{best or 'none yet'}.",
        )


def loss_unit(group: Group) -> str:
    """What a loss is measured in."""
    return "nats per token" if group.language else "nats per example"


def front(points: Sequence[tuple[float, float]], larger_is_better: bool) -> list[int]:
    """The points (cost, quality) that no other beats: none is at most as dear and at least as good,
    and better in one; by rising cost.
    """
    sign = -1 if larger_is_better else 1
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if (
            not found
            or sign * points[i][1] < sign * points[found[-1]][1]
            or points[i] == points[found[-1]]
        ):
            found.append(i)
    return found


def pareto(
    group: Group,
    name: str,
    *,
    title: str,
    cost: Callable[[Record], float | None],
    label: str,
    accuracy: bool,
) -> Picture | None:
    """Quality against a cost, every run a labelled point, those that no other beats joined by a
    line; None without any.

    accuracy: accuracy (larger is better) instead of the validation loss, both of the evaluation of
    lowest loss.
    """
    found = [(record, cost(record), record.best) for record in group.records]
    known = [
        (record, float(x), float(best["accuracy" if accuracy else "loss"]))
        for record, x, best in found
        if x and best
    ]
    if not known:
        return None
    points = [(x, y) for _, x, y in known]
    best = front(points, accuracy)
    with figures.style():
        figure, axes = figures.new(3.9)
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        if max(xs) > 8 * min(xs):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(
                LogLocator(subs=(1, 3) if max(xs) > 100 * min(xs) else (1, 2, 5))
            )
        axes.plot(
            [xs[i] for i in best],
            [ys[i] for i in best],
            color=MUTED,
            linewidth=1.2,
            linestyle="--",
            zorder=1,
        )
        for i, (record, x, y) in enumerate(known):
            look, on_front = _look(record), i in best
            face = look["color"] if record.state == "finished" else "none"
            axes.plot(
                x,
                y,
                look["marker"],
                color=look["color"],
                markerfacecolor=face,
                markersize=7,
                zorder=3,
            )
            if on_front:
                axes.plot(
                    x,
                    y,
                    "o",
                    color=INK,
                    markerfacecolor="none",
                    markersize=12,
                    markeredgewidth=1.1,
                    zorder=2,
                )
        _margins(axes, xs, ys)
        quality = "accuracy" if accuracy else f"validation loss ({loss_unit(group)})"
        axes.set(xlabel=label, ylabel=quality)
        if accuracy:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g} %"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if axes.get_xscale() == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(5))
        figure.canvas.draw()
        figure.set_layout_engine("none")
        names = [
            [shortened(record.label, 28), shortened(record.label, 16), str(record.number)]
            for record, _, _ in known
        ]
        place(
            axes,
            points,
            names,
            [_look(record)["color"] for record, _, _ in known],
            lines=[[points[i] for i in best]],
        )
        on_front = ", ".join(known[i][0].label for i in best)
        text = f"{len(known)} runs, {quality} against {label}. On the front, beaten by no other: {on_front}."
        return figures.picture(figure, name, title, text)


def _margins(axes: Any, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Room around the points for their labels."""
    low, high = min(ys), max(ys)
    pad = 0.15 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - pad, high + pad)
    if axes.get_xscale() == "log":
        axes.set_xlim(min(xs) / 2.2, max(xs) * 2.2)
    else:
        pad = 0.25 * (max(xs) - min(xs)) or 0.5 * max(xs)
        axes.set_xlim(max(0.0, min(xs) - pad), max(xs) + pad)


def number(value: float) -> str:
    """1234567 -> '1.23 M'."""
    for factor, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"


def energy_by_kind(group: Group, name: str, memory: bool) -> Picture | None:
    """Energy of one inference by kind of layer, a bar a run: of the bytes moved (memory), or of the
    operations; None without any.
    """
    found = [(record, record.energy) for record in group.records if record.energy is not None]
    if not found:
        return None
    shown = [(record, _by_kind(energy, memory)) for record, energy in found]
    largest = max(sum(parts.values()) for _, parts in shown)
    if not largest:
        return None
    # Kinds too small to be seen are shown together; a kind has one color in both plots.
    colors = dict(zip(_largest_first([energy for _, energy in found]), itertools.cycle(SERIES)))
    kinds = [
        kind for kind in colors if any(parts.get(kind, 0.0) > 0.004 * largest for _, parts in shown)
    ]
    scale, prefix = energy_unit(largest)
    with figures.style():
        rest = any(
            value and kind not in kinds for _, parts in shown for kind, value in parts.items()
        )
        figure, axes = figures.new(1.1 + 0.3 * len(shown) + 0.2 * -(-(len(kinds) + rest) // 3))
        for row, (_, parts) in enumerate(shown):
            left = 0.0
            for kind in kinds:
                axes.barh(
                    row,
                    parts.get(kind, 0.0) / scale,
                    left=left / scale,
                    height=0.66,
                    color=colors[kind],
                )
                left += parts.get(kind, 0.0)
            axes.barh(
                row,
                (sum(parts.values()) - left) / scale,
                left=left / scale,
                height=0.66,
                color=GRID,
            )
            total = sum(parts.values()) / scale
            axes.annotate(
                f"{total:.3g}",
                (total, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
            )
        axes.set_yticks(range(len(shown)), [shortened(record.label, 20) for record, _ in shown])
        axes.invert_yaxis()
        axes.set(
            xlim=(0, 1.16 * largest / scale),
            xlabel=f"{prefix} per {group.unit} at {found[0][1].technology}",
        )
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        handles = [Patch(color=colors[kind], label=kind.replace("_", " ")) for kind in kinds]
        handles += [Patch(color=GRID, label="all others")] * rest
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=3,
            handlelength=1.2,
            columnspacing=0.9,
            fontsize=9.5,
        )
        said = "; ".join(
            f"{record.label}: {sum(parts.values()) / scale:.3g} {prefix}" for record, parts in shown
        )
        what = "Energy of moving bytes" if memory else "Energy of operations"
        return figures.picture(
            figure,
            name,
            what,
            f"Stacked bars of the energy of {what.split(' of ')[1]}, by kind of layer. {said}.",
        )


def _by_kind(energy: Any, memory: bool) -> dict[str, float]:
    return energy.memory_by_kind if memory else energy.arithmetic_by_kind


def _largest_first(energies: Sequence[Any]) -> list[str]:
    """The kinds of layers, those first that are the largest share of a run's operations or of its
    moved bytes.
    """
    shares: dict[str, float] = {}
    for energy, memory in itertools.product(energies, (False, True)):
        parts = _by_kind(energy, memory)
        for kind, value in parts.items():
            shares[kind] = max(shares.get(kind, 0.0), value / (sum(parts.values()) or 1.0))
    return sorted(shares, key=shares.__getitem__, reverse=True)


def energy_unit(largest: float) -> tuple[float, str]:
    """Picojoules in a unit that suits values up to so many picojoules, and its name."""
    return (1e6, "µJ") if largest >= 1e5 else (1e3, "nJ") if largest >= 1e2 else (1.0, "pJ")


def insight_pictures(insight: Insight, name: str) -> list[Picture]:
    """Kinds of functions, reads of inputs, and, where there was data, balance of bits and tables
    that could be dropped.
    """
    pictures = [_kinds(insight.layers, f"{name}-kinds"), _reads(insight.layers, f"{name}-reads")]
    if any(layer.thresholds > 1 for layer in insight.layers):
        pictures.append(
            _thresholds(
                [layer for layer in insight.layers if layer.thresholds > 1], f"{name}-thresholds"
            )
        )
    watched = [layer for layer in insight.layers if layer.balance is not None]
    if watched:
        pictures += [_balance(watched, f"{name}-balance"), _kept(watched, f"{name}-kept")]
    return pictures


def _bars(layers: Sequence[LayerInsight], parts: Sequence[tuple[str, str, Sequence[float]]]) -> Any:
    """Stacked bars from 0 to 100 %, one a layer; parts: (name, color, share of each layer)."""
    figure, axes = figures.new(1.35 + 0.3 * len(layers))
    left = np.zeros(len(layers))
    for label, color, shares in parts:
        widths = 100 * np.asarray(shares, float)
        axes.barh(
            range(len(layers)),
            widths,
            left=left,
            height=0.66,
            facecolor=color,
            edgecolor=MUTED,
            linewidth=0.6,
            label=label,
        )
        left += widths
    axes.set_yticks(range(len(layers)), [shortened(layer.name, 20) for layer in layers])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of the tables")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2, handlelength=1.2, columnspacing=1.0)
    return figure


def _kinds(layers: Sequence[LayerInsight], name: str) -> Picture:
    with figures.style():
        colors = (MUTED, SERIES[0], SERIES[1], GRID)
        figure = _bars(
            layers,
            [
                (KIND_WORDS[k], colors[i], [layer.kinds[k] / layer.tables for layer in layers])
                for i, k in enumerate(KINDS)
            ],
        )
        total = sum(layer.tables for layer in layers)
        shares = ", ".join(
            f"{KIND_WORDS[kind]} {sum(layer.kinds[kind] for layer in layers) / total:.1%}"
            for kind in KINDS
        )
        return figures.picture(
            figure,
            name,
            "Functions the tables compute",
            f"Of {total} tables: {shares}. By layer in the table.",
        )


def _reads(layers: Sequence[LayerInsight], name: str) -> Picture:
    """How many inputs are read so many times, one line a layer."""
    with figures.style():
        figure, axes = figures.new(3.2 + 0.2 * -(-len(layers) // 2))
        most = max(int(layer.reads.max()) for layer in layers)
        edges = np.arange(most + 2) if most <= 30 else np.linspace(0, most + 1, 31)
        for i, layer in enumerate(layers):
            shares, _ = np.histogram(layer.reads, edges)
            look: dict[str, Any] = {
                "color": SERIES[i % len(SERIES)],
                "linestyle": _LINES[i // len(SERIES) % len(_LINES)],
            }
            axes.stairs(
                100 * shares / len(layer.reads),
                edges - 0.5,
                label=shortened(layer.name, 22),
                linewidth=1.5,
                **look,
            )
        axes.set(xlabel="times an input is read", ylabel="% of the inputs")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.legend(loc="outside lower center", ncols=2, handlelength=1.6, columnspacing=1.0)
        said = "; ".join(
            f"{r.name}: {int((r.reads == 0).sum())} of {len(r.reads)} inputs never, at most "
            f"{int(r.reads.max())} times"
            for r in layers
        )
        return figures.picture(
            figure,
            name,
            "How often inputs are read",
            f"Histogram of how many slots read an input. {said}.",
        )


def _thresholds(layers: Sequence[LayerInsight], name: str) -> Picture:
    """How much each threshold of the thermometer matters: the influence of its bits, a mean over
    the features.
    """
    with figures.style():
        figure, axes = figures.new(2.8 + 0.2 * -(-len(layers) // 2))
        means = [layer.influence.reshape(-1, layer.thresholds).mean(0) for layer in layers]
        for i, (layer, mean) in enumerate(zip(layers, means)):
            look: dict[str, Any] = {
                "color": SERIES[i % len(SERIES)],
                "linestyle": _LINES[i // len(SERIES) % len(_LINES)],
            }
            places = np.arange(1, layer.thresholds + 1)
            axes.plot(
                places,
                mean,
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=5,
                label=shortened(layer.name, 22),
                **look,
            )
        axes.set(xlabel="threshold, from the lowest", ylabel="influence of its bits")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        figure.legend(loc="outside lower center", ncols=2, handlelength=1.6, columnspacing=1.0)
        said = "; ".join(
            f"{layer.name}: " + ", ".join(f"{v:.2f}" for v in mean)
            for layer, mean in zip(layers, means)
        )
        text = f"Influence of each threshold's bits on the tables, a mean over the features, from the lowest threshold. {said}."
        return figures.picture(figure, name, "Which thresholds matter", text)


def _balance(layers: Sequence[LayerInsight], name: str) -> Picture:
    with figures.style():
        figure, axes = figures.new(3.2 + 0.2 * -(-len(layers) // 2))
        edges = np.linspace(0, 1, 21)
        for i, layer in enumerate(layers):
            assert layer.balance is not None
            counts, _ = np.histogram(layer.balance, edges)
            look: dict[str, Any] = {
                "color": SERIES[i % len(SERIES)],
                "linestyle": _LINES[i // len(SERIES) % len(_LINES)],
            }
            axes.stairs(
                100 * counts / layer.tables,
                edges,
                label=shortened(layer.name, 22),
                linewidth=1.5,
                **look,
            )
        axes.set(xlabel="how often a table gives 1", ylabel="% of the tables", xlim=(0, 1))
        figure.legend(loc="outside lower center", ncols=2, handlelength=1.6, columnspacing=1.0)
        said = "; ".join(
            f"{r.name}: median {np.median(r.balance):.2f}" for r in layers if r.balance is not None
        )
        return figures.picture(
            figure,
            name,
            "Balance of the tables' bits",
            f"Histogram of how often a table gives 1, of all it was asked. {said}.",
        )


def _kept(layers: Sequence[LayerInsight], name: str) -> Picture:
    with figures.style():
        kept = [(layer.kept or 0) / layer.tables for layer in layers]
        figure = _bars(
            layers,
            [
                ("needed", SERIES[2], kept),
                ("could be dropped", SERIES[6], [1 - share for share in kept]),
            ],
        )
        said = "; ".join(f"{r.name}: {r.tables - (r.kept or 0)} of {r.tables}" for r in layers)
        return figures.picture(
            figure,
            name,
            "Tables that could be dropped",
            f"Tables without which no output on the evaluated data changes. {said}.",
        )
