"""A report as files: one HTML page that needs nothing else, its plots as PNGs, numbers as CSV."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
from absl import logging

from quweit_jax.errors import InputError, first_line, needed
from quweit_jax.reading import without_surrogates
from quweit_jax.report import figures, plots
from quweit_jax.report.figures import Picture
from quweit_jax.report.insight import KINDS, LayerInsight
from quweit_jax.report.insight_plots import KIND_WORDS, insight_pictures
from quweit_jax.report.summary import Group, Json, RunSummary, group

with needed("for reports"):
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from PIL import Image


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of runs with its plots."""

    group: Group
    pictures: list[Picture]


def write(
    runs: Sequence[RunSummary],
    skipped: Sequence[tuple[str, str]],
    *,
    technology: str,
    title: str = "",
    precision: str | None = None,
) -> dict[str, bytes]:
    """All files of a report by name: index.html, *.png, *.csv.

    A run that cannot be shown is left out, which is said, and never stops the report.
    skipped: given paths that hold no run, with the reason. technology: of the energies. precision:
      of dense products, if not the runs' own.

    Raises:
      InputError: no run can be shown.
    """
    how: Json = {"technology": technology, "title": title, "precision": precision}
    try:
        return _write(runs, skipped, **how)
    except Exception as error:
        shown, left = [], [*skipped]
        for run in runs:  # alone, each: the one that fails then is the one to leave out
            try:
                _write([run], [], **how)
                shown.append(run)
            except Exception as why:
                reason = f"it cannot be shown ({type(why).__name__}: {first_line(why)})"
                logging.warning("report: %s is left out: %s.", run.label, reason)
                left.append((run.path, reason))
        if len(shown) == len(runs):
            raise
        if not shown:
            raise InputError(f"report: none of the runs can be shown; {left[-1][1]}.") from error
        return _write(shown, left, **how)


def _write(
    runs: Sequence[RunSummary],
    skipped: Sequence[tuple[str, str]],
    *,
    technology: str,
    title: str,
    precision: str | None,
) -> dict[str, bytes]:
    sections = [
        Section(found, _pictures(found, f"group{i}", technology))
        for i, found in enumerate(group(runs), 1)
    ]
    insights = {
        r.number: insight_pictures(r.insight, f"run{r.number}")
        for r in runs
        if r.insight is not None
    }
    environment = Environment(
        loader=PackageLoader("quweit_jax", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _shown,
        "svg": lambda p: Markup(p.svg),
        "png": _data_uri,
        "pretty": lambda v: json.dumps(v, indent=1, ensure_ascii=False, sort_keys=True),
        "share": lambda v: f"{v:.1%}",
    }
    said = [text for r in runs if r.energy is not None for text in r.energy.assumptions]
    html = environment.get_template("report.html.jinja").render(
        title=title or "Report",
        runs=runs,
        sections=sections,
        insights=insights,
        skipped=skipped,
        precision=precision,
        assumptions=list(dict.fromkeys(said)),
        light=Markup(figures.css_variables(False)),
        dark=Markup(figures.css_variables(True)),
        kinds=KIND_WORDS,
        states=Counter(r.state for r in runs),
    )
    files = {"index.html": without_surrogates(html).encode()}
    for pictures in (*(section.pictures for section in sections), *insights.values()):
        files |= {f"{picture.name}.png": picture.png for picture in pictures}
    return files | {name: _csv(rows) for name, rows in tables(runs).items()}


def _pictures(found: Group, name: str, technology: str) -> list[Picture]:
    accuracy = not found.language
    quality, what = ("accuracy", "Accuracy") if accuracy else ("loss", "Loss")
    energy, unit = f"{name}-{quality}-energy", f"µJ per {found.unit} at {technology}"
    made = [
        plots.loss_curves(found, f"{name}-loss"),
        plots.pareto(
            found,
            energy,
            title=f"{what} against energy",
            cost=lambda r: r.energy and r.energy.total_pj / 1e6,
            label=unit,
            accuracy=accuracy,
        ),
        plots.pareto(
            found,
            f"{energy}-operations",
            title=f"{what} against the energy of operations alone",
            cost=lambda r: r.energy and r.energy.arithmetic_pj / 1e6,
            label=f"{unit}, memory left out",
            accuracy=accuracy,
        ),
        plots.pareto(
            found,
            f"{name}-loss-memory",
            title="Loss against memory",
            cost=lambda r: r.bytes_deployed,
            label="bytes deployed",
            accuracy=False,
        ),
        plots.energy_by_kind(found, f"{name}-energy-operations", memory=False),
        plots.energy_by_kind(found, f"{name}-energy-memory", memory=True),
    ]
    return [picture for picture in made if picture is not None]


def row(run: RunSummary) -> Json:
    """A run's numbers by column; None where they aren't known."""
    best, costs, energy = run.best or {}, run.costs, run.energy
    return {
        "run": run.number,
        "name": run.name,
        "state": run.state,
        "model": run.model,
        "mlp": run.mlp,
        "data": run.data,
        "parameters": costs and costs.parameters,
        "step": run.step,
        "steps": run.config.get("steps"),
        "best step": best.get("step"),
        "validation loss": best.get("loss"),
        "accuracy": best.get("accuracy"),
        "bytes deployed": run.bytes_deployed,
        "multiplications": costs and costs.total_multiplications,
        "multiplications replaced": run.replaced,
        "table look-ups": costs and sum(costs.lookups.values()),
        "dense precision": run.dense_precision or None,
        "dense bytes deployed": run.dense_bytes,
        "dense energy, pJ": run.dense_energy and run.dense_energy.total_pj,
        "energy, pJ": energy and energy.total_pj,
        "arithmetic, pJ": energy and energy.arithmetic_pj,
        "memory, pJ": energy and energy.memory_pj,
        "reason": run.reason,
    }


def tables(runs: Sequence[RunSummary]) -> dict[str, list[Json]]:
    """The numbers of a report, {file: rows}: of runs, of curves, of energies by kind of layer, of
    look-up layers and of their inputs.
    """
    named: dict[str, list[Json]] = {
        "runs": [row(run) for run in runs],
        "curves": [],
        "energy": [],
        "lookup_layers": [],
        "reads": [],
    }
    for run in runs:
        who = {"run": run.number, "name": run.name}
        keys = ("step", "split", "loss", "accuracy")
        named["curves"] += [who | {key: x.get(key) for key in keys} for x in run.rows]
        if (energy := run.energy) is not None:
            named["energy"] += [
                {
                    **who,
                    "kind": kind,
                    "arithmetic_pj": energy.arithmetic_by_kind[kind],
                    "memory_pj": energy.memory_by_kind[kind],
                }
                for kind in energy.by_kind
            ]
        for layer in run.insight.layers if run.insight is not None else ():
            named["lookup_layers"].append(who | _layer_row(layer))
            named["reads"] += _reads(run, layer)
    return {f"{name}.csv": rows for name, rows in named.items() if rows}


def _layer_row(layer: LayerInsight) -> Json:
    return {
        "block": layer.block,
        "layer": layer.layer,
        "tables": layer.tables,
        "lut_inputs": layer.lut_inputs,
        **{kind: layer.kinds[kind] for kind in KINDS},
        "inputs": len(layer.reads),
        "inputs_never_read": int((layer.reads == 0).sum()),
        "median_balance": None if layer.balance is None else float(np.median(layer.balance)),
        "could_be_dropped": None if layer.kept is None else layer.tables - layer.kept,
    }


def _reads(run: RunSummary, layer: LayerInsight) -> list[Json]:
    return [
        {
            "run": run.number,
            "block": layer.block,
            "layer": layer.layer,
            "input": i,
            "feature": i // layer.thresholds if layer.thresholds else None,
            "threshold": i % layer.thresholds if layer.thresholds else None,
            "reads": int(reads),
            "influence": float(influence),
        }
        for i, (reads, influence) in enumerate(zip(layer.reads, layer.influence))
    ]


def _csv(rows: Sequence[Json]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return without_surrogates(out.getvalue()).encode()


def _shown(value: float | None, digits: int = 4) -> str:
    """A number for a table: with commas if whole, else so many digits; nothing for None."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _data_uri(pixels: np.ndarray) -> Markup:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return Markup(f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}")
