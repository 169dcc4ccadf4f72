"""Matplotlib figures for light and dark pages: an SVG whose colors the page decides, and a PNG.

They are narrow, so that letters stay readable on a phone; wide pages put several side by side.
"""

from __future__ import annotations

import dataclasses
import html
import io
import re
from typing import Any

from quweit_jax.errors import needed
from quweit_jax.training import looks

with needed("for reports"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure


WIDTH = 5.0  # inches

# name: (on a light page, on a dark page); in the SVG the light color becomes a CSS variable.
COLORS = {
    "ink": ("#1c2127", "#e8ebee"),
    "muted": ("#5a636e", "#a9b2bd"),
    "grid": ("#d3d9df", "#3a424b"),
    **{f"series-{i}": pair for i, pair in enumerate(looks.SERIES)},
}
INK, MUTED, GRID = (COLORS[name][0] for name in ("ink", "muted", "grid"))
SERIES = [light for light, _ in looks.SERIES]
_STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "text.parse_math": False,  # names of runs are no formulas, whatever dollars they hold
    "svg.fonttype": "path",
    "svg.hashsalt": "quweit_jax",  # the same figure is the same file
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure for the page.

    name: of its PNG file, without suffix. alt: what it shows, in words. svg: an element.
    """

    name: str
    title: str
    alt: str
    svg: str
    png: bytes


def style() -> Any:
    """The context manager, or decorator, within which all figures are made and drawn."""
    return matplotlib.rc_context(_STYLE)


def shortened(text: str, longest: int = 24) -> str:
    """At most so many letters, the middle left out; tables have the whole."""
    return text if len(text) <= longest else f"{text[: longest // 2 - 1]}…{text[-(longest // 2) :]}"


def legend(figure: Figure, columns: int = 2, **options: Any) -> None:
    """A legend below the plot."""
    chosen = {"handlelength": 1.6, "columnspacing": 1.0, **options}
    figure.legend(loc="outside lower center", ncols=columns, **chosen)


def new(height: float) -> tuple[Figure, Axes]:
    """A figure of one plot, WIDTH wide."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def picture(figure: Figure, name: str, title: str, alt: str) -> Picture:
    """Draws a figure for light and dark pages at once."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=200, facecolor="white")
    return Picture(name, title, alt, _element(text.getvalue(), name, alt), png.getvalue())


def _element(svg: str, name: str, alt: str) -> str:
    """An SVG file as an element of a page: ids of its own, no size of its own, colors by name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'(xlink:)?href="#([^"]+)"', rf'href="#{name}-\2"', svg)
    # Presentation attributes know no variables, styles do; Matplotlib writes styles.
    for variable, (light, _) in COLORS.items():
        svg = svg.replace(light, f"var(--{variable})")
    head, rest = svg[: svg.index(">")], svg[svg.index(">") :]
    head = re.sub(r'\s(width|height|version|xmlns(:\w+)?)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(alt, quote=True)}" focusable="false"{rest}'


def css_variables(dark: bool) -> str:
    """The colors as CSS declarations."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLORS.items())
