"""A report as files: one HTML page that needs nothing else, its plots as PNGs, and its numbers as
CSV.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from quweit_jax.report import figures, plots
from quweit_jax.report.figures import Picture
from quweit_jax.report.insight import KINDS
from quweit_jax.report.summary import Group, Record, group

COLUMNS = (
    "run",
    "name",
    "state",
    "model",
    "mlp",
    "data",
    "parameters",
    "step",
    "steps",
    "best step",
    "validation loss",
    "accuracy",
    "bytes deployed",
    "multiplications",
    "multiplications replaced",
    "table look-ups",
    "energy, pJ",
    "arithmetic, pJ",
    "memory, pJ",
    "reason",
)


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of runs with its plots."""

    group: Group
    pictures: list[Picture]


def write(
    records: Sequence[Record],
    skipped: Sequence[tuple[str, str]],
    *,
    technology: str,
    title: str = "",
) -> dict[str, bytes]:
    """All files of a report by name: index.html, *.png, *.csv.

    skipped: given paths that hold no run, with the reason. technology: of the energies.
    """
    sections = [
        Section(found, _pictures(found, f"group{i}", technology))
        for i, found in enumerate(group(list(records)), 1)
    ]
    insights = {
        r.number: plots.insight_pictures(r.insight, f"run{r.number}")
        for r in records
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
        "pretty": _pretty,
        "share": lambda v: f"{v:.1%}",
    }
    html = environment.get_template("report.html.jinja").render(
        title=title or "Report",
        records=records,
        sections=sections,
        loose=[record for record in records if record.language is None],
        insights=insights,
        skipped=skipped,
        technology=technology,
        assumptions=_assumptions(records),
        light=Markup(figures.css_variables(False)),
        dark=Markup(figures.css_variables(True)),
        kinds=plots.KIND_WORDS,
        states={
            state: sum(r.state == state for r in records)
            for state in dict.fromkeys(r.state for r in records)
        },
    )
    files = {"index.html": html.encode()}
    for shown in [
        *(p for s in sections for p in s.pictures),
        *(p for each in insights.values() for p in each),
    ]:
        files[f"{shown.name}.png"] = shown.png
    return files | {name: _csv(rows) for name, rows in tables(records).items()}


def _pictures(found: Group, name: str, technology: str) -> list[Picture]:
    accuracy = not found.language
    quality, what = ("accuracy", "Accuracy") if accuracy else ("loss", "Loss")

    def microjoules(part: str) -> Callable[[Record], float | None]:
        return lambda record: record.energy and getattr(record.energy, part) / 1e6

    energy, at = f"{name}-{quality}-energy", f"µJ per {found.unit} at {technology}"
    made = [
        plots.loss_curves(found, f"{name}-loss"),
        plots.pareto(
            found,
            energy,
            title=f"{what} against energy",
            cost=microjoules("total_pj"),
            label=at,
            accuracy=accuracy,
        ),
        plots.pareto(
            found,
            f"{energy}-operations",
            title=f"{what} against the energy of operations alone",
            cost=microjoules("arithmetic_pj"),
            label=f"{at}, memory left out",
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


def row(record: Record) -> dict[str, Any]:
    """A run's numbers by column; None where they aren't known."""
    best, costs, energy = record.best or {}, record.costs, record.energy
    values = (
        record.number,
        record.name,
        record.state,
        record.model,
        record.mlp,
        record.data,
        costs and costs.parameters,
        record.step,
        record.config.get("steps"),
        best.get("step"),
        best.get("loss"),
        best.get("accuracy"),
        record.bytes_deployed,
        costs and costs.total_multiplications,
        record.replaced,
        costs and sum(costs.lookups.values()),
        energy and energy.total_pj,
        energy and energy.arithmetic_pj,
        energy and energy.memory_pj,
        record.reason,
    )
    return dict(zip(COLUMNS, values))


def tables(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """The numbers of a report, {file: rows}: of runs, of curves, of energies by kind of layer, of
    look-up layers and of their inputs.
    """
    curves = [
        {
            "run": r.number,
            "name": r.name,
            "step": x["step"],
            "split": x["split"],
            "loss": x["loss"],
            "accuracy": x.get("accuracy"),
        }
        for r in records
        for x in r.rows
    ]
    energy = [
        {
            "run": r.number,
            "name": r.name,
            "kind": kind,
            "arithmetic_pj": r.energy.arithmetic_by_kind[kind],
            "memory_pj": r.energy.memory_by_kind[kind],
        }
        for r in records
        if r.energy is not None
        for kind in r.energy.by_kind
    ]
    layers = [(r, layer) for r in records if r.insight is not None for layer in r.insight.layers]
    lookup = [
        {
            "run": r.number,
            "name": r.name,
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
        for r, layer in layers
    ]
    reads = [
        {
            "run": r.number,
            "block": layer.block,
            "layer": layer.layer,
            "input": i,
            "feature": i // layer.thresholds if layer.thresholds else None,
            "threshold": i % layer.thresholds if layer.thresholds else None,
            "reads": int(count),
            "influence": float(layer.influence[i]),
        }
        for r, layer in layers
        for i, count in enumerate(layer.reads)
    ]
    named = {
        "runs": [row(r) for r in records],
        "curves": curves,
        "energy": energy,
        "lookup_layers": lookup,
        "reads": reads,
    }
    return {f"{name}.csv": rows for name, rows in named.items() if rows}


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _assumptions(records: Sequence[Record]) -> list[str]:
    """What all energies rest on, each said once."""
    return list(
        dict.fromkeys(
            text for r in records if r.energy is not None for text in r.energy.assumptions
        )
    )


def _shown(value: Any, digits: int = 4) -> str:
    """A number for a table: whole ones with commas, others with so many digits, nothing for None."""
    if value is None or value == "":
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True)


def _data_uri(pixels: np.ndarray) -> Markup:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return Markup(f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}")
