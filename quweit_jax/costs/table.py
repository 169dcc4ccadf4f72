"""Costs, energies and memory of a model beside its dense baseline: a plain object, and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quweit_jax.costs import fpga
from quweit_jax.costs.count import baseline, multiplications_replaced, of_config
from quweit_jax.costs.energy import Energy, estimate
from quweit_jax.costs.memory import of_inference
from quweit_jax.ops.counts import Costs

COLUMNS = ("multiplications", "additions", "lookups", "comparisons", "bytes_moved", "bytes_stored")
# Sums of energy: what the object calls them, and what `Energy` does.
PARTS = {
    "total": "total",
    "arithmetic": "arithmetic",
    "counted_arithmetic": "matrix",
    "memory": "memory",
}


def account(
    config: Any,
    technologies: Sequence[str],
    outputs: int | None = None,
    *,
    context: int | None = None,
    precision: str | None = None,
    image_shape: tuple[int, int] | None = None,
    **energy_options: Any,
) -> tuple[dict[str, Any], Costs]:
    """A config's costs beside its dense baseline's: (the object of `compared`, the config's own
    costs).

    technologies: names or files, see `energy.estimate`, which takes energy_options. outputs,
      context, precision: see `costs.of_config`. image_shape: side and channels, where they are not
      those of the config's data.

    Raises:
      InputError: see `costs.of_config` and `energy.estimate`.
    """

    asked: dict[str, Any] = {"outputs": outputs, "context": context, "precision": precision}
    if image_shape is not None:
        asked |= dict(zip(("image_size", "channels"), image_shape))

    def both(model: Mapping[str, object] | None) -> tuple[Costs, list[Energy]]:
        counted = of_config(config, model=model, **asked)
        return counted, [estimate(counted, each, **energy_options) for each in technologies]

    own, dense = both(None), baseline(config["model"])
    return compared(*own, None if dense is None else (*both(dense[0]), dense[1])), own[0]


def with_total(counts: Mapping[str, int] | Mapping[int, int]) -> dict[str, int]:
    """By type, with their sum as 'total'."""
    return {"total": sum(counts.values()), **{str(key): value for key, value in counts.items()}}


def statement(costs: Costs, energies: Sequence[Energy]) -> dict[str, Any]:
    """All sums of one model, in plain values: what `--json` prints. Energies by technology, in
    picojoules.
    """
    return {
        "unit": costs.unit,
        "context": costs.context,
        "multiplications": with_total(costs.multiplications),
        "additions": with_total(costs.additions),
        "elementwise": {name: with_total(part) for name, part in vars(costs.elementwise).items()},
        "lookups": with_total(costs.lookups),
        "comparisons": with_total(costs.comparisons),
        "bytes": {
            "moved": with_total(costs.bytes_moved),
            "stored": with_total(costs.bytes_stored),
            "state": costs.state_bytes,
            "inference": {**vars(memory := of_inference(costs)), "total": memory.total},
        },
        "parameters": costs.parameters,
        "by_kind": {
            kind: {name: _sum(getattr(part, name)) for name in (*COLUMNS, "parameters")}
            for kind, part in costs.by_kind().items()
        },
        "energy_pj": {
            energy.technology: {
                **{name: getattr(energy, f"{part}_pj") for name, part in PARTS.items()},
                "by_kind": energy.by_kind,
                "arithmetic_by_kind": energy.arithmetic_by_kind,
                "memory_by_traffic": energy.memory_by_traffic,
            }
            for energy in energies
        },
        "assumptions": {energy.technology: energy.assumptions for energy in energies},
    }


def compared(
    costs: Costs, energies: Sequence[Energy], dense: tuple[Costs, Sequence[Energy], str] | None
) -> dict[str, Any]:
    """`statement`, with what a dense baseline (its costs, energies and what it is) costs, and the
    ratios to it.

    multiplications_replaced: a share, None without a baseline. energy_ratio: how many times more
    the baseline takes, by technology.
    """
    result = statement(costs, energies)
    if dense is None:
        beside = ("multiplications_replaced", "baseline", "energy_ratio")
        return result | dict.fromkeys(beside)
    baseline, dense_energies, name = dense
    result["multiplications_replaced"] = multiplications_replaced(costs, baseline)
    result["baseline"] = {"name": name, **statement(baseline, dense_energies)}
    result["energy_ratio"] = {
        ours.technology: {
            name: getattr(theirs, f"{part}_pj") / getattr(ours, f"{part}_pj")
            for name, part in PARTS.items()
        }
        for ours, theirs in zip(energies, dense_energies)
    }
    return result


def render(result: Mapping[str, Any], title: str, layers: Costs | None = None) -> str:
    """The object of `compared` as a table a person reads; layers: every layer's row too."""
    context = result["context"]
    unit = result["unit"] + ("" if context is None else f" at a context of {context:,}")
    lines = [f"{title}: one {unit}", ""]
    energies, kinds = result["energy_pj"], result["by_kind"]
    header = ["kind", *(c.replace("_", " ") for c in COLUMNS), *(f"uJ {t}" for t in energies)]
    rows = [
        [
            kind,
            *(f"{part[c]:,}" for c in COLUMNS),
            *(_micro(energy["by_kind"][kind]) for energy in energies.values()),
        ]
        for kind, part in kinds.items()
    ]
    sums = [f"{sum(part[c] for part in kinds.values()):,}" for c in COLUMNS]
    rows.append(["total", *sums, *(_micro(energy["total"]) for energy in energies.values())])
    lines += table(header, rows)
    if layers is not None:
        lines += ["", *_layers(layers)]
    lines += [""]
    for name in ("multiplications", "additions", "lookups", "comparisons"):
        lines.append(f"{name}: {_by_type(result[name], ' inputs' if name == 'lookups' else '')}")
    outside = ", ".join(
        f"{name} {part['total']:,}" for name, part in result["elementwise"].items() if part["total"]
    )
    lines.append(f"elementwise, outside products and sums of vectors: {outside or 'nothing'}")
    stored = result["bytes"]
    lines.append(f"bytes moved: {_by_type(stored['moved'])}")
    lines.append(
        f"bytes stored: {_by_type(stored['stored'])}; {result['parameters']:,} parameters before "
        "deployment"
    )
    if stored["state"]:
        lines.append(f"bytes of state kept for one text: {stored['state']:,}")
    for technology, energy in result["energy_pj"].items():
        lines.append(
            f"energy at {technology}: {_micro(energy['total'])} uJ, arithmetic "
            f"{_micro(energy['arithmetic'])} (of products, sums, look-ups and "
            f"thermometers {_micro(energy['counted_arithmetic'])}), memory "
            f"{_micro(energy['memory'])}"
        )
    lines += fpga.lines(result["fpga"]) if "fpga" in result else []
    for name, needed in result.get("training_memory", {}).items():
        each = ", ".join(f"{what} {count:,}" for what, count in needed.items() if what != "total")
        lines.append(f"bytes of a training step, {name}: {needed['total']:,} ({each})")
    return "\n".join([*lines, *_beside(result), "", *_assumptions(result)])


def _beside(result: Mapping[str, Any]) -> list[str]:
    dense = result["baseline"]
    if dense is None:
        return ["multiplications replaced: no dense baseline to compare with"]
    lines = [
        "",
        f"baseline, {dense['name']}: {dense['multiplications']['total']:,} multiplications, "
        f"{dense['bytes']['stored']['total']:,} bytes stored",
        f"multiplications replaced: {result['multiplications_replaced']:.2%}",
    ]
    for technology, ratio in result["energy_ratio"].items():
        energy = dense["energy_pj"][technology]
        lines.append(
            f"energy of the baseline at {technology}: {_micro(energy['total'])} uJ, "
            f"{ratio['total']:.2f} times; arithmetic {ratio['arithmetic']:.2f} times "
            f"(of products, sums, look-ups and thermometers {ratio['counted_arithmetic']:.2f}), "
            f"memory {ratio['memory']:.2f}"
        )
    return lines


def _assumptions(result: Mapping[str, Any]) -> list[str]:
    """Those shared by all technologies once."""
    every = result["assumptions"]
    shared = [
        s for s in next(iter(every.values()), []) if all(s in said for said in every.values())
    ]
    alone = [f"- {name}: {s}" for name, said in every.items() for s in said if s not in shared]
    return ["assumed:", *(f"- {said}" for said in shared), *alone]


def _layers(costs: Costs) -> list[str]:
    header = ["layer", "kind", *(column.replace("_", " ") for column in COLUMNS)]
    rows = [
        [layer.name, layer.kind, *(f"{_sum(getattr(layer, column)):,}" for column in COLUMNS)]
        for layer in costs.layers
    ]
    return table(header, rows)


def _sum(counts: Mapping[str, int] | Mapping[int, int] | int) -> int:
    return counts if isinstance(counts, int) else sum(counts.values())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their contents, the first to the left and numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    left = [i == 0 or not any(row[i][:1].isdigit() for row in rows) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(w) if l else cell.rjust(w) for cell, w, l in zip(row, widths, left)
        ).rstrip()
        for row in (header, *rows)
    ]


def _by_type(counts: Mapping[str, int], suffix: str = "") -> str:
    if not counts["total"]:
        return "none"
    each = ", ".join(f"{key}{suffix} {value:,}" for key, value in counts.items() if key != "total")
    return f"{counts['total']:,} ({each})"


def _micro(picojoules: float) -> str:
    return f"{picojoules / 1e6:,.4g}" if picojoules < 1e9 else f"{picojoules / 1e6:,.0f}"
