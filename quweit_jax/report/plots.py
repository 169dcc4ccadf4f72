"""The plots that compare runs: losses, quality against energy and memory, energy by layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from quweit_jax.costs.energy import Energy
from quweit_jax.errors import needed
from quweit_jax.report import figures
from quweit_jax.report.figures import GRID, INK, MUTED, SERIES, Picture, shortened
from quweit_jax.report.label_placement import place
from quweit_jax.report.summary import Group, RunSummary
from quweit_jax.training import looks
from quweit_jax.training.metrics import draw_losses

with needed("for reports"):
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter


@figures.style()
def loss_curves(group: Group, name: str) -> Picture | None:
    """Training losses (thin) and validation losses (marked) of a group's runs; None without any."""
    shown = [run for run in group.runs if run.rows]
    if not shown:
        return None
    figure, axes = figures.new(3.4 + 0.2 * -(-len(shown) // 2))
    draw_losses(axes, [(shortened(run.label), run.rows, _style(run)) for run in shown])
    axes.set(xlabel="step", ylabel=f"loss ({loss_unit(group)})")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figures.legend(figure, columns=min(2, len(shown)))
    best = "; ".join(
        f"{r.label}: {r.best['loss']:.3f} at step {r.best['step']}" for r in shown if r.best
    )
    text = f"Training and validation loss by step. Lowest validation losses: {best or 'none yet'}."
    return figures.picture(figure, name, "Loss", text)


def _style(run: RunSummary) -> dict[str, Any]:
    """The color of a run's kind, with a line and a marker of its own."""
    return looks.style(looks.kind_of(run.config.get("model") or {}), run.number - 1)


def loss_unit(group: Group) -> str:
    """What a loss is measured in."""
    return "nats per token" if group.language else "nats per example"


def front(points: Sequence[tuple[float, float]], larger_is_better: bool) -> list[int]:
    """The points (cost, quality) that no other beats, by rising cost.

    One beats another if it is at most as dear and at least as good, and better in one of the two.
    """
    sign = -1 if larger_is_better else 1
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        last = points[found[-1]] if found else None
        if last is None or sign * points[i][1] < sign * last[1] or points[i] == last:
            found.append(i)
    return found


@figures.style()
def pareto(
    group: Group,
    name: str,
    *,
    title: str,
    cost: Callable[[RunSummary], float | None],
    label: str,
    accuracy: bool,
) -> Picture | None:
    """Quality against a cost: every run a labelled point, those on the front ringed and joined;
    None without any.

    accuracy: accuracy instead of the validation loss, both of the evaluation of lowest loss.
    """
    found = [(run, cost(run), run.best) for run in group.runs]
    known = [
        (run, float(x), float(best["accuracy" if accuracy else "loss"]))
        for run, x, best in found
        if x and best
    ]
    known = [(run, x, y) for run, x, y in known if math.isfinite(x) and math.isfinite(y)]
    if not known:
        return None
    points = [(x, y) for _, x, y in known]
    joined = [points[i] for i in front(points, accuracy)]
    on_front = ", ".join(known[i][0].label for i in front(points, accuracy))
    quality = "accuracy" if accuracy else f"validation loss ({loss_unit(group)})"
    figure, axes = figures.new(3.9)
    axes.set(xlabel=label, ylabel=quality)
    _scale(axes, points, accuracy)
    axes.plot(*zip(*joined), color=MUTED, linewidth=1.2, linestyle="--", zorder=1)
    for run, *point in known:
        look = {**_style(run), "linestyle": ""}
        face = look["color"] if run.state == "finished" else "none"
        axes.plot(*point, markerfacecolor=face, markersize=7, zorder=3, **look)
        if tuple(point) in joined:
            ring = {"color": INK, "markerfacecolor": "none", "markeredgewidth": 1.1}
            axes.plot(*point, "o", markersize=12, zorder=2, **ring)
    figure.canvas.draw()
    figure.set_layout_engine("none")
    runs = [run for run, *_ in known]
    names = [[shortened(r.label, 28), shortened(r.label, 16), str(r.number)] for r in runs]
    colors = [_style(run)["color"] for run in runs]
    place(axes, points, names, colors, lines=[joined])
    text = (
        f"{len(known)} runs, {quality} against {label}. On the front, beaten by no other: "
        f"{on_front}."
    )
    return figures.picture(figure, name, title, text)


def _scale(axes: Axes, points: Sequence[tuple[float, float]], accuracy: bool) -> None:
    """Scales, ticks, and room around the points for their labels."""
    xs, ys = zip(*points)
    least, most, low, high = min(xs), max(xs), min(ys), max(ys)
    pad = 0.15 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - pad, high + pad)
    if most > 8 * least:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if most > 100 * least else (1, 2, 5)))
        axes.set_xlim(least / 2.2, most * 2.2)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        pad = 0.25 * (most - least) or 0.5 * most
        axes.set_xlim(max(0.0, least - pad), most + pad)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if accuracy:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g} %"))


def number(value: float) -> str:
    """1234567 -> '1.23 M'."""
    for factor, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"


@figures.style()
def energy_by_kind(group: Group, name: str, memory: bool) -> Picture | None:
    """Energy of one inference by kind of layer, a bar a run: of the bytes moved (memory), or of the
    operations; None without any.
    """
    shown = [run for run in group.runs if run.energy and math.isfinite(run.energy.total_pj)]
    energies = [run.energy for run in shown if run.energy is not None]
    labels = [run.label for run in shown]
    bars = [_by_kind(energy, memory) for energy in energies]
    totals = [sum(parts.values()) for parts in bars]
    largest = max(totals, default=0.0)
    if not largest:
        return None
    # Kinds too small to be seen are shown together.
    colors = {kind: SERIES[looks.color_of_layer(kind)] for kind in _largest_first(energies)}
    kinds = [k for k in colors if any(parts.get(k, 0.0) > 0.004 * largest for parts in bars)]
    rest = any(value and kind not in kinds for parts in bars for kind, value in parts.items())
    scale, unit = energy_unit(largest)
    figure, axes = figures.new(1.1 + 0.3 * len(bars) + 0.2 * -(-(len(kinds) + rest) // 3))
    for row, (parts, total) in enumerate(zip(bars, totals)):
        left = 0.0
        widths = [(parts.get(kind, 0.0), colors[kind]) for kind in kinds]
        for value, color in (*widths, (None, GRID)):
            value = total - left if value is None else value
            axes.barh(row, value / scale, left=left / scale, height=0.66, color=color)
            left += value
        beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{total / scale:.3g}", (total / scale, row), fontsize=9.5, **beside)
    axes.set_yticks(range(len(bars)), [shortened(label, 20) for label in labels])
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 1.16 * largest / scale),
        xlabel=f"{unit} per {group.unit} at {energies[0].technology}",
    )
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    handles = [Patch(color=colors[kind], label=kind.replace("_", " ")) for kind in kinds]
    handles += [Patch(color=GRID, label="all others")] * rest
    figures.legend(figure, 3, handles=handles, handlelength=1.2, columnspacing=0.9, fontsize=9.5)
    said = "; ".join(f"{label}: {t / scale:.3g} {unit}" for label, t in zip(labels, totals))
    what = "moving bytes" if memory else "operations"
    text = f"Stacked bars of the energy of {what}, by kind of layer. {said}."
    return figures.picture(figure, name, f"Energy of {what}", text)


def _by_kind(energy: Energy, memory: bool) -> dict[str, float]:
    return energy.memory_by_kind if memory else energy.arithmetic_by_kind


def _largest_first(energies: Sequence[Energy]) -> list[str]:
    """The kinds of layers by their largest share of a run's operations or of its moved bytes."""
    shares: dict[str, float] = {}
    for energy, memory in itertools.product(energies, (False, True)):
        parts = _by_kind(energy, memory)
        for kind, value in parts.items():
            shares[kind] = max(shares.get(kind, 0.0), value / (sum(parts.values()) or 1.0))
    return sorted(shares, key=shares.__getitem__, reverse=True)


def energy_unit(largest: float) -> tuple[float, str]:
    """A unit for values up to so many picojoules: the picojoules in it, and its name."""
    return (1e6, "µJ") if largest >= 1e5 else (1e3, "nJ") if largest >= 1e2 else (1.0, "pJ")
