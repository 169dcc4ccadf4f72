"""Makes the pictures of the documentation from the project's own functions, each for a light and a
dark page.

python docs/figures.py [NAME ...]
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

from quweit_jax.deploy.hardware.blocks import description, verilog
from quweit_jax.ops import integer, lut, packed_lut, packed_ternary, pair_table, thermometer
from quweit_jax.ops.sums import conditional_sum

OUT = Path(__file__).parent / "figures"
# Ink, quiet ink, fill, two colors that tell apart without hue, and a diverging map whose middle is
# the page.
LIGHT = {
    "ink": "#222222",
    "quiet": "#777777",
    "fill": "#e8eaf6",
    "one": "#3f51b5",
    "two": "#d9730d",
    "map": "RdBu_r",
    "page": "#ffffff",
}
DARK = {
    "ink": "#e2e4e9",
    "quiet": "#9aa0ad",
    "fill": "#2c3248",
    "one": "#8c9eff",
    "two": "#ffb066",
    "map": "quweit_dark",
    "page": "#1e2129",
}
matplotlib.colormaps.register(
    matplotlib.colors.LinearSegmentedColormap.from_list(
        "quweit_dark", ["#4a7de0", "#1e2129", "#e0674a"]
    )
)

Colors = dict[str, str]
Figure = plt.Figure


def canvas(
    colors: Colors, width: float, height: float, columns: int = 1, **options
) -> tuple[Figure, list[plt.Axes]]:
    """A transparent figure in inches whose text and lines have the page's ink."""
    ink = {
        key: colors["ink"]
        for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    }
    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "quweit_jax",
            "font.size": 10,
            "axes.titlesize": 10.5,
            **ink,
        }
    )
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, **options)
    for axis in axes[0]:
        axis.set_facecolor("none")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def box(
    axis: plt.Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    colors: Colors,
    *,
    color: str = "fill",
    size: float = 9,
) -> None:
    """A rounded box with text in its middle; (x, y) is its middle too."""
    corner = (x - width / 2, y - height / 2)
    edge = colors["quiet"] if color == "fill" else colors[color]
    axis.add_patch(
        FancyBboxPatch(
            corner,
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            fc=colors["fill"],
            ec=edge,
            lw=1.2,
        )
    )
    axis.text(x, y, text, ha="center", va="center", fontsize=size, color=colors["ink"])


def arrow(
    axis: plt.Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colors: Colors,
    *,
    color: str = "quiet",
    bend: float = 0.0,
) -> None:
    """An arrow from one point to another."""
    style = {
        "arrowstyle": "-|>",
        "color": colors[color],
        "lw": 1.3,
        "connectionstyle": f"arc3,rad={bend}",
        "shrinkA": 0,
        "shrinkB": 0,
    }
    axis.annotate("", end, start, arrowprops=style)


def bare(axis: plt.Axes, width: float, height: float) -> None:
    """No frame, equal units, (0, 0) at the lower left."""
    axis.set_axis_off()
    axis.set_xlim(0, width)
    axis.set_ylim(0, height)
    axis.set_aspect("equal")


def lookup(colors: Colors) -> Figure:
    """One table of three inputs reads three of eight bits; what it returns is what `lut_lookup`
    returns.
    """
    bits = np.asarray([1, 0, 0, 1, 1, 0, 1, 0], np.float32)
    mapping = np.asarray([[4, 1, 6]])
    table = np.asarray([[-0.7, 0.2, -0.1, 0.5, -0.4, 0.8, 0.3, -0.9]], np.float32)
    value = float(lut.lut_lookup(bits, mapping, table)[0])
    address = int(sum(int(bits[m]) << l for l, m in enumerate(mapping[0])))
    figure, (axis,) = canvas(colors, 7.2, 3.3)
    bare(axis, 14.4, 6.6)
    axis.text(0.2, 6.2, "input bits", color=colors["quiet"], va="center")
    for i, bit in enumerate(bits):
        read = i in mapping[0]
        edge = colors["one"] if read else colors["quiet"]
        axis.add_patch(
            Rectangle(
                (0.4 + 0.8 * i, 5.0),
                0.8,
                0.8,
                fc=colors["fill"] if read else "none",
                ec=edge,
                lw=1.6 if read else 0.8,
            )
        )
        axis.text(0.8 + 0.8 * i, 5.4, f"{bit:.0f}", ha="center", va="center", color=colors["ink"])
        axis.text(
            0.8 + 0.8 * i, 4.72, str(i), ha="center", va="center", color=colors["quiet"], fontsize=8
        )
    places = {0: 5.6, 1: 3.6, 2: 1.6}  # slot 0, the least significant, on the right
    for l, m in enumerate(mapping[0]):
        arrow(axis, (0.8 + 0.8 * m, 4.5), (places[l], 3.35), colors, color="one")
        axis.text(
            places[l],
            3.0,
            f"{bits[m]:.0f}",
            ha="center",
            va="center",
            fontsize=15,
            color=colors["ink"],
        )
        axis.text(
            places[l],
            2.35,
            f"slot {l}\nweight {1 << l}",
            ha="center",
            va="center",
            fontsize=8,
            color=colors["quiet"],
        )
    axis.text(
        3.6,
        1.25,
        f"address = {' + '.join(str(1 << l) for l in (2, 1, 0) if bits[mapping[0][l]])} = "
        f"{address}",
        ha="center",
        fontsize=11,
    )
    axis.text(9.2, 6.2, "table", color=colors["quiet"], va="center")
    for a, entry in enumerate(table[0]):
        y, here = 5.6 - 0.68 * a, a == address
        axis.add_patch(
            Rectangle(
                (8.6, y - 0.32),
                2.0,
                0.64,
                fc=colors["fill"] if here else "none",
                ec=colors["two" if here else "quiet"],
                lw=1.8 if here else 0.7,
            )
        )
        axis.text(8.3, y, str(a), ha="right", va="center", fontsize=8.5, color=colors["quiet"])
        axis.text(9.6, y, f"{entry:+.1f}", ha="center", va="center", color=colors["ink"])
    arrow(axis, (5.9, 1.45), (7.75, 5.6 - 0.68 * address), colors, color="two")
    y = 5.6 - 0.68 * address
    arrow(axis, (10.7, y), (11.7, y), colors, color="two")
    axis.text(11.85, y + 0.32, f"value {value:+.1f}", va="center", color=colors["ink"])
    axis.text(
        11.85, y - 0.38, f"bit {int(value > 0)} (value > 0)", va="center", color=colors["ink"]
    )
    return figure


def heat(axis: plt.Axes, values: np.ndarray, colors: Colors, limit: float) -> None:
    """Numbers in colored cells, rows from the top."""
    axis.imshow(values, cmap=colors["map"], vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        strong = abs(value) > 0.6 * limit
        color = "#ffffff" if strong else colors["ink"]
        axis.text(
            column,
            row,
            "0" if value == 0 else f"{value:+.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color=color,
        )
    axis.set_yticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def gradient_of_and(colors: Colors) -> Figure:
    """The gradient a table that computes AND of three inputs gives each of its inputs, at each
    address: three rules.
    """
    table = jnp.asarray([[-1.0] * 7 + [1.0]])
    rest = np.asarray(
        [[(a & ((1 << l) - 1)) | ((a >> (l + 1)) << l) for a in range(8)] for l in range(3)]
    )

    def rule(weighting: lut.EFD) -> np.ndarray:
        differences = np.asarray(lut.finite_differences(table, weighting))[:, 0]
        return np.stack([differences[l][rest[l]] for l in (2, 1, 0)])

    rules = {
        "finite difference: w = 1 at distance 0, else 0": lut.EFD("exponential", 1.0, 0.0),
        "extended, exponential: w = 0.28 / 3^h": lut.efd_weighting(3),
        "extended, harmonic: w = 1 / (h + 1)": lut.efd_weighting(3, "harmonic"),
    }
    figure, axes = canvas(colors, 7.4, 5.2)
    plt.close(figure)
    figure, axes = plt.subplots(
        4, 1, figsize=(7.2, 5.4), height_ratios=[1, 3, 3, 3], layout="constrained"
    )
    heat(axes[0], np.asarray(table), colors, 1.4)
    axes[0].set_title("the table: AND of three inputs, as -1 and +1", loc="left")
    axes[0].set_xticks(range(8), [f"{a:03b}" for a in range(8)])
    for axis, (title, weighting) in zip(axes[1:], rules.items()):
        values = rule(weighting)
        heat(axis, values, colors, float(np.abs(values).max()) * 1.2)
        axis.set_title(title, loc="left")
        axis.set_yticks(range(3), ["bit 2", "bit 1", "bit 0"])
        axis.set_xticks(range(8), [f"{a:03b}" for a in range(8)] if axis is axes[-1] else [""] * 8)
    axes[-1].set_xlabel("address that is read (bit 2, bit 1, bit 0)")
    return figure


def weightings(colors: Colors) -> Figure:
    """What an entry counts by its Hamming distance, and what all entries of a distance count
    together, n = 6.
    """
    n = 6
    distance = np.arange(n)
    count = np.asarray([math.comb(n - 1, h) for h in distance])
    figure, axes = canvas(colors, 7.2, 2.9, 2, layout="constrained")
    for place, (name, color) in enumerate((("exponential", "one"), ("harmonic", "two"))):
        # Row 0 of the matrix belongs to input 0 and the address 0: the distance to an entry is the
        # number of its other bits.
        matrix = lut.efd_matrix(n, lut.efd_weighting(n, name))[0, 0]
        weight = np.asarray([abs(matrix[((1 << h) - 1) << 1]) for h in distance])
        for axis, values in zip(axes, (weight, weight * count)):
            axis.bar(
                distance + (place - 0.5) * 0.38,
                values / values.sum(),
                0.36,
                color=colors[color],
                label=name,
            )
    axes[0].set_title("one entry (shares)", loc="left")
    axes[1].set_title("all entries at that distance (shares)", loc="left")
    for axis in axes:
        axis.set_xlabel("Hamming distance h")
        axis.set_xticks(distance)
    axes[0].legend(frameon=False)
    return figure


def surrogate(colors: Colors) -> Figure:
    """Four thermometer bits of a normal variable, and the gradient each passes back through either
    window.
    """
    thresholds = thermometer.normal_quantiles(4)
    x = jnp.linspace(-3, 3, 601)
    bits = np.asarray(thermometer.encode(x[:, None], thresholds))[:, 0]
    figure, axes = canvas(colors, 7.2, 2.9, 3, layout="constrained", sharex=True)
    for i in range(4):
        axes[0].plot(x, bits[:, i] + 1.35 * i, color=colors["one"], lw=1.6)
        axes[0].axhline(1.35 * i, color=colors["quiet"], lw=0.4)
    axes[0].set_yticks([1.35 * i + 0.5 for i in range(4)], [f"bit {i}" for i in range(4)])
    axes[0].tick_params(axis="y", length=0)
    axes[0].spines["left"].set_visible(False)
    axes[0].set_title("bits", loc="left")
    for axis, shape in zip(axes[1:], thermometer.WINDOWS):
        for i, threshold in enumerate(thresholds):
            slope = jax.vmap(
                jax.grad(
                    lambda v, threshold=threshold, shape=shape: thermometer.encode_ste(
                        v[None], threshold[None], window=1.0, shape=shape
                    )[0, 0]
                )
            )(x)
            axis.plot(x, slope, color=colors["one" if i % 2 else "two"], lw=1.3)
            axis.axvline(float(threshold), color=colors["quiet"], lw=0.6, ls=":")
        axis.set_title(f"d bit / d x, {shape}", loc="left")
        axis.set_ylim(0, 1.1)
    for axis in axes:
        axis.set_xlabel("x after the norm")
    return figure


def sums(colors: Colors) -> Figure:
    """The same bits and vectors summed as 0/1 and as -1/+1: a constant, which differs from output
    to output, is gone.
    """
    keys = jax.random.split(jax.random.key(0))
    bits = jax.random.bernoulli(keys[0], 0.5, (400, 896)).astype(jnp.float32)
    vectors = 0.006 * jax.random.normal(keys[1], (896, 10))
    figure, axes = canvas(colors, 7.2, 2.9, 2, layout="constrained", sharey=True)
    for axis, counted, title in zip(
        axes, (bits, 2 * bits - 1), ("bits as 0 and 1", "bits as -1 and +1")
    ):
        out = np.asarray(conditional_sum(counted, vectors))
        axis.axhline(0, color=colors["quiet"], lw=0.8)
        axis.errorbar(
            range(10), out.mean(0), out.std(0), fmt="o", ms=4, color=colors["one"], capsize=3
        )
        axis.set_title(title, loc="left")
        axis.set_xlabel("output")
        axis.set_xticks(range(10))
    axes[0].set_ylabel("mean and deviation over 400 tokens")
    return figure


def byte_layouts(colors: Colors) -> Figure:
    """Where the bits lie: a 1-bit table of n = 4 in two bytes, and four ternary weights in one;
    both made by the packing functions.
    """
    table = np.asarray(
        [[-0.3, 0.4, 0.1, -0.8, -0.2, 0.6, -0.5, -0.1, 0.9, 0.2, -0.4, 0.3, -0.7, 0.5, 0.8, -0.6]],
        np.float32,
    )
    tables = np.asarray(packed_lut.pack_tables(jnp.asarray(table)))[0]
    weights = np.asarray([[1], [-1], [0], [1]], np.int8)
    spread = np.zeros((16, 1), np.int8)
    spread[::4] = weights  # the inputs that share the lowest byte of their word
    byte = int(packed_ternary.pack_ternary(spread)[0, 0, 0]) & 0xFF
    figure, (axis,) = canvas(colors, 7.2, 4.2)
    bare(axis, 14.4, 8.4)

    def row(value: int, left: float, y: float, under: list[str], color: str) -> None:
        for place in range(8):  # bit 7 on the left, as numbers are written
            bit = 7 - place
            axis.add_patch(
                Rectangle(
                    (left + 0.75 * place, y),
                    0.75,
                    0.75,
                    fc=colors["fill"] if value >> bit & 1 else "none",
                    ec=colors["quiet"],
                    lw=0.8,
                )
            )
            axis.text(
                left + 0.75 * (place + 0.5),
                y + 0.37,
                str(value >> bit & 1),
                ha="center",
                va="center",
            )
            axis.text(
                left + 0.75 * (place + 0.5),
                y + 0.98,
                str(bit),
                ha="center",
                va="center",
                fontsize=7.5,
                color=colors["quiet"],
            )
            axis.text(
                left + 0.75 * (place + 0.5),
                y - 0.32,
                under[bit],
                ha="center",
                va="center",
                fontsize=7.5,
                color=colors[color],
            )
        axis.text(
            left + 6.1, y + 0.37, f"0x{value:02X}", va="center", fontsize=8.5, color=colors["quiet"]
        )

    axis.text(0.1, 7.9, "a table of 16 entries: sign bits, entry 0 in bit 0 of byte 0", va="center")
    for i, value in enumerate(tables):
        row(
            int(value),
            0.1 + 7.3 * i,
            5.9,
            [f"{table[0, 8 * i + bit]:+.1f}" for bit in range(8)],
            "one",
        )
        axis.text(
            0.1 + 7.3 * i,
            7.2,
            f"byte {i}: entries {8 * i} to {8 * i + 7}",
            fontsize=8.5,
            color=colors["quiet"],
        )
    axis.text(
        0.1, 4.2, "four ternary weights of one output: two bits each, weight + 1", va="center"
    )
    row(byte, 0.1, 2.2, [""] * 8, "two")
    axis.text(6.9, 1.45, "input", fontsize=8.5, color=colors["quiet"])
    axis.text(6.9, 0.85, "weight, and the code it is kept as", fontsize=8.5, color=colors["quiet"])
    for j, weight in enumerate(weights[:, 0]):
        middle = 0.1 + 0.75 * (7 - 2 * j)
        axis.plot([middle - 0.6, middle + 0.6], [1.95, 1.95], color=colors["two"], lw=1.6)
        axis.text(middle, 1.45, f"4k+{j}", ha="center", fontsize=8.5, color=colors["quiet"])
        axis.text(
            middle,
            0.85,
            f"{weight:+d} as {weight + 1}" if weight else "0 as 1",
            ha="center",
            fontsize=8.5,
            color=colors["ink"],
        )
    return figure


def integer_functions(colors: Colors) -> Figure:
    """Softmax, GELU and the exponential by shifts, beside the real functions."""
    figure, axes = canvas(colors, 7.2, 2.9, 3, layout="constrained")
    scale = jnp.float32(0.05)
    steps = jnp.arange(-128, 128, dtype=jnp.int32)
    x = np.asarray(steps) * float(scale)
    inverse = integer.inverse_scale(scale)
    negative = np.asarray(steps) <= 0
    exponential = np.asarray(integer.shift_exp(steps, inverse, 15)).astype(np.float64) / (
        float(inverse) * 2**15
    )
    axes[0].plot(x[negative], np.exp(x[negative]), color=colors["quiet"], lw=3, alpha=0.6)
    axes[0].plot(x[negative], exponential[negative], color=colors["one"], lw=1.3)
    axes[0].set_title("exp, shift-exp", loc="left")
    row = jnp.stack([steps, jnp.zeros_like(steps)], -1)
    out = integer.shiftmax_units(row, inverse, bits=16)
    axes[1].plot(x, 1 / (1 + np.exp(-x)), color=colors["quiet"], lw=3, alpha=0.6)
    axes[1].plot(x, np.asarray(out)[:, 0] * 2.0**-15, color=colors["one"], lw=1.3)
    axes[1].set_title("softmax, Shiftmax", loc="left")
    out = integer.shift_gelu_units(steps, integer.inverse_scale(scale * integer.GELU_SLOPE))
    out_scale = [scale / 128]
    axes[2].plot(
        x,
        np.asarray(jax.nn.gelu(x, approximate=False)),
        color=colors["quiet"],
        lw=3,
        alpha=0.6,
        label="real",
    )
    axes[2].plot(
        x, np.asarray(out) * float(out_scale[0]), color=colors["one"], lw=1.3, label="integers"
    )
    axes[2].set_title("GELU, ShiftGELU", loc="left")
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.set_xlabel("x = x_int * 0.05")
    return figure


def integer_block(colors: Colors) -> Figure:
    """One block of the integer-only ViT: every requantization (Q) and its bits, with both kinds of
    MLP.
    """
    figure, (axis,) = canvas(colors, 8.2, 7.3)
    bare(axis, 16.4, 14.8)
    left = [
        ("residual stream, 16 bits", "plain"),
        ("I-LayerNorm -> int32", "fill"),
        ("Q8  quant_attention_norm", "one"),
        ("qkv: int8 x int8 -> int32", "fill"),
        ("Q8  quant_qkv", "one"),
        ("queries x keys -> int32", "fill"),
        ("Q8  quant_scores", "one"),
        ("Shiftmax -> 16 bits", "fill"),
        ("weights x values -> int32", "fill"),
        ("Q8  quant_mixed", "one"),
        ("proj: int8 x int8 -> int32", "fill"),
        ("Q16  quant_proj", "one"),
        ("Q16  quant_attention  (+ residual)", "two"),
    ]
    dense = [
        "up: int8 x int8 -> int32",
        "Q8  quant_up",
        "ShiftGELU -> int32",
        "Q8  quant_gelu",
        "down: int8 x int8 -> int32",
        "Q16  quant_down",
    ]
    table = ["compare: int8 > int16", "1-bit tables", "add int8 vectors -> int32"]

    def column(x: float, top: float, rows: list[tuple[str, str]], width: float) -> list[float]:
        places = [top - 1.06 * i for i in range(len(rows))]
        for y, (text, color) in zip(places, rows):
            if color == "plain":
                axis.text(x, y, text, ha="center", va="center", fontsize=9, color=colors["quiet"])
            else:
                box(axis, x, y, width, 0.72, text, colors, color=color, size=8)
        for above, below in itertools.pairwise(places):
            arrow(axis, (x, above - 0.38), (x, below + 0.38), colors)
        return places

    axis.text(3.4, 14.5, "attention", ha="center", fontsize=11)
    places = column(3.4, 13.8, left, 5.0)
    axis.text(11.3, 14.5, "MLP", ha="center", fontsize=11)
    rows = [
        ("residual stream, 16 bits", "plain"),
        ("I-LayerNorm -> int32", "fill"),
        ("Q8  quant_mlp_norm", "one"),
    ]
    top = column(11.3, 13.8, rows, 5.0)
    first, end, half = top[-1] - 1.9, 1.08, 0.38
    for x, rows, name in ((9.1, dense, "dense"), (13.5, table, "weightless")):
        axis.text(x, first + 0.52, name, ha="center", fontsize=9, color=colors["quiet"])
        last = column(
            x, first, [(text, "one" if text.startswith("Q") else "fill") for text in rows], 4.1
        )[-1]
        side = 0.8 if x > 11.3 else -0.8
        arrow(axis, (11.3 + side, top[-1] - half), (x, first + 1.0), colors)
        arrow(axis, (x, last - half), (11.3 + side, end + half), colors)
    box(axis, 11.3, end, 5.0, 0.72, "Q16  quant_mlp  (+ residual)", colors, color="two", size=8)
    for side, start, finish in (
        (5.0, (5.3, places[0]), (5.95, places[-1])),
        (0, (13.2, top[0]), (13.85, end)),
    ):
        far = finish[0] + 0.5 if side else 16.0
        path = [start, (far, start[1]), (far, finish[1]), finish]
        axis.plot(*zip(*path[:-1]), color=colors["two"], lw=1.3)
        arrow(axis, path[-2], path[-1], colors, color="two")
    return figure


def lookup_glu(colors: Colors) -> Figure:
    """LookupGLU: the way of a token through a block, and the table of the gate at the start."""
    figure, axes = canvas(colors, 8.4, 4.3, 2, width_ratios=[1.25, 1], layout="constrained")
    flow, table = axes
    bare(flow, 9.4, 9.0)
    half, middle = 0.38, 4.7
    box(flow, middle, 8.5, 5.6, 0.76, "LayerNorm, rounded to int8", colors, size=8.5)
    rows = [
        (7.0, "ternary sum: +x, -x or 0", "fill"),
        (5.5, "less an offset", "fill"),
        (4.0, "4-bit code: compare", "one"),
    ]
    for x, name in ((2.3, "first"), (7.1, "second")):
        for (y, text, color), above in zip(rows, (8.5, 7.0, 5.5)):
            box(flow, x, y, 4.3, 0.76, text, colors, color=color, size=8)
            start = (middle + (x - middle) / 3, above) if above == 8.5 else (x, above)
            arrow(flow, (start[0], start[1] - half), (x, y + half), colors)
        arrow(flow, (x, 4.0 - half), (middle + (x - middle) / 4, 2.5 + half), colors, color="one")
        side = "right" if x < middle else "left"
        flow.text(
            x + (-0.4 if x < middle else 0.4),
            3.1,
            f"{name} code",
            ha=side,
            fontsize=8,
            color=colors["quiet"],
        )
    box(flow, middle, 2.5, 5.6, 0.76, "table: read one int8 entry", colors, color="two", size=8.5)
    arrow(flow, (middle, 2.5 - half), (middle, 1.0 + half), colors)
    box(flow, middle, 1.0, 5.6, 0.76, "ternary sum, one scale", colors, size=8.5)
    gate = pair_table.silu_gate(4, 0.25)
    whole = np.asarray(pair_table.round_entries(jnp.asarray(gate) * pair_table.entry_scale(gate)))
    limit = float(np.abs(whole).max())
    image = table.imshow(whole, cmap=colors["map"], vmin=-limit, vmax=limit, origin="lower")
    table.set_title("the table at the start: silu(2a) b in sixteenths", loc="left", fontsize=9)
    places = range(0, 16, 4)
    table.set_xticks(places, [str(i - 8) for i in places])
    table.set_yticks(places, [str(i - 8) for i in places])
    table.set_xlabel("second code, b = code / 4")
    table.set_ylabel("first code, a = code / 4")
    bar = figure.colorbar(image, ax=table, shrink=0.75)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def drawn_block(width: int = 128, units: int = 512) -> description.GLUBlock:
    """A LookupGLU's block of random weights."""
    draw = np.random.default_rng(0)
    branch = description.Branch(np.full(width, 2**31 - 1), np.full(width, 38))
    gate = pair_table.round_entries(jnp.asarray(pair_table.silu_gate(4, 0.25)) * 16)
    return description.GLUBlock(
        draw.integers(-1, 2, (width, 2 * units)).astype(np.int8),
        np.zeros(2 * units, np.int64),
        np.asarray(pair_table.halfway_points(jnp.asarray(75), 4), np.int64),
        np.asarray(gate, np.int8)[None],
        draw.integers(-1, 2, (units, width)).astype(np.int8),
        np.zeros(width, np.int64),
        (branch, branch),
    )


def block_circuit(colors: Colors) -> Figure:
    """The circuit that `export --to=verilog` makes of a LookupGLU of width 128: what a unit passes
    through a cycle, and its memories.
    """
    made = verilog.build(drawn_block())
    schedule, width, units = made.schedule, made.block.features, made.block.units
    memory = {m.name: f"{len(m.rows):,} x {m.bits} bits" for m in made.memories}
    figure, (axis,) = canvas(colors, 8.2, 4.6)
    bare(axis, 16.4, 9.2)
    half, left, right = 0.42, 4.6, 12.4
    steps = [
        (8.4, "x: 8 bits, a feature a cycle", "plain"),
        (7.2, f"{width} words are held", "fill"),
        (6.0, f"mix: 2 trees of {width} words, +, - or 0", "fill"),
        (4.8, "codes: an offset, 4 comparisons each", "one"),
        (3.6, "gate: the entry at two codes", "two"),
        (2.4, f"sum: {width} accumulators of {schedule.sum_bits} bits", "fill"),
        (1.2, f"requantize: {schedule.lanes} lanes in turn", "one"),
        (0.1, f"y: 16 bits, every {schedule.every} cycles", "plain"),
    ]
    for y, text, color in steps:
        if color == "plain":
            axis.text(left, y, text, ha="center", va="center", fontsize=9, color=colors["quiet"])
        else:
            box(axis, left, y, 7.4, 2 * half, text, colors, color=color, size=8.5)
    for (above, *_), (below, *_) in itertools.pairwise(steps):
        arrow(axis, (left, above - half), (left, below + (half if below > 0.5 else 0.3)), colors)
    beside = [
        (6.0, f"weights of a unit: {memory['mix']}"),
        (4.8, f"offsets: {memory['offsets']}"),
        (3.6, f"table: {memory['gate']}"),
        (2.4, f"weights of a unit: {memory['sum']}"),
        (1.2, f"residual stream: {width} x 16 bits"),
    ]
    for y, text in beside:
        box(axis, right, y, 6.2, 2 * half, text, colors, size=8.5)
        arrow(axis, (right - 3.1, y), (left + 3.7, y), colors)
    brace = right + 3.4
    axis.plot([brace, brace], [2.4 - half, 6.0 + half], color=colors["quiet"], lw=1.2)
    axis.text(
        brace - 0.2,
        7.0,
        f"{schedule.parallel} of {units} units a cycle; {schedule.interval:,} cycles a token",
        ha="right",
        va="center",
        fontsize=9,
        color=colors["quiet"],
    )
    return figure


FIGURES: dict[str, Callable[[Colors], Figure]] = {
    "lookup": lookup,
    "gradient_of_and": gradient_of_and,
    "weightings": weightings,
    "surrogate": surrogate,
    "sums": sums,
    "byte_layouts": byte_layouts,
    "integer_functions": integer_functions,
    "integer_block": integer_block,
    "lookup_glu": lookup_glu,
    "block_circuit": block_circuit,
}


def main(names: list[str]) -> None:
    """Writes NAME.svg and NAME-dark.svg for each."""
    OUT.mkdir(exist_ok=True)
    for name in names or FIGURES:
        for suffix, colors in (("", LIGHT), ("-dark", DARK)):
            figure = FIGURES[name](colors)
            figure.savefig(
                OUT / f"{name}{suffix}.svg",
                transparent=True,
                bbox_inches="tight",
                pad_inches=0.08,
                metadata={"Date": None},
            )
            plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
