"""What every channel mixer costs at the published sizes, beside the same model with dense MLPs in
int8: one token of nanoGPT's character model (6 layers of width 384, context 256), and one image of
I-ViT-T (DeiT-T at 224 pixels, integers only). Nothing is trained.

    python -m experiments.studies.block_costs [--out=experiments/results]

Energies are estimates from counts (`quweit_jax.costs.energy`): operations and bytes moved, weights
from DRAM. Matrices outside the channel mixers are int8 in every row.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from experiments.studies import common
from quweit_jax.commands import cli
from quweit_jax.config import load_file
from quweit_jax.costs import count, energy

TECHNOLOGIES = ("45nm", "7nm")
# What the table calls it -> what the model's config changes.
MIXERS: dict[str, dict[str, Any]] = {
    "dense MLP, int8": {"mlp": "dense"},
    "published weightless block": {"mlp": "weightless"},
    "LookupGLU, 4 units a feature": {"mlp": "lookup_glu"},
    "LookupGLU, 10 units a feature": {"mlp": "lookup_glu", "lookup_glu": {"hidden": 10}},
    "LookupGLU, ternary projections in attention": {"mlp": "lookup_glu", "linear": "ternary"},
    "LookupGLU, 2 units a feature, ternary projections in attention": {
        "mlp": "lookup_glu",
        "lookup_glu": {"hidden": 2},
        "linear": "ternary",
    },
    "none, ternary projections in attention": {"mlp": "none", "linear": "ternary"},
    "vector tables on thermometer bits": {
        "mlp": "weightless",
        "weightless": {"sum": "vector", "num_luts": 0.5},
    },
    "ternary GLU (BitGLU)": {"mlp": "bitglu"},
    "none": {"mlp": "none"},
}
HEADER = (
    "channel mixer",
    "products replaced",
    "additions",
    "look-ups",
    "bytes stored",
    "bytes moved",
    *(f"energy, {name}: less by" for name in TECHNOLOGIES),
)


def counted(model: dict[str, Any], changes: dict[str, Any], outputs: int, size: dict[str, int]):
    """The costs of a model with another channel mixer; numbers of units are given a feature."""
    width = model.get("width") or 192
    values = dict(model)
    for key, change in changes.items():
        if isinstance(change, dict):
            scaled = {
                k: int(v * width) if isinstance(v, int | float) else v for k, v in change.items()
            }
            change = {**model[key], **scaled}
        values[key] = change
    return count.count(values, outputs, precision="int8", **size)


def rows(spec: str, outputs: int, size: dict[str, int], more: dict[str, Any]) -> list[list[str]]:
    """A row a channel mixer. more: further models, what the table calls them -> their config."""
    model = load_file(str(common.EXPERIMENTS / "configs" / spec)).model.to_dict()
    found, first = [], None
    cases = {name: counted(model, c, outputs, size) for name, c in mixers(model).items()}
    cases |= {name: count.count(c, outputs, precision="int8") for name, c in more.items()}
    for name, costs in cases.items():
        spent = [energy.estimate(costs, technology).total_pj for technology in TECHNOLOGIES]
        first = first or (costs.total_multiplications, spent)
        replaced = 1 - costs.total_multiplications / first[0]
        found.append(
            [
                name,
                f"{replaced:.1%}",
                f"{sum(costs.additions.values()):,}",
                f"{sum(costs.lookups.values()):,}",
                f"{sum(costs.bytes_stored.values()):,}",
                f"{sum(costs.bytes_moved.values()):,}",
                *(f"{before / now:.2f}" for before, now in zip(first[1], spent)),
            ]
        )
    return found


def mixers(model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Those that the model can have: an integer one has no vector tables and no BitGLU."""
    if not model.get("integer"):
        return MIXERS
    return {name: c for name, c in MIXERS.items() if "vector" not in name and "BitGLU" not in name}


def main() -> None:
    """Writes blocks_costs.md."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=common.EXPERIMENTS / "results")
    args = made.parse_args()
    ternary = {"name": "matmulfree", "width": 384, "layers": 6, "context": 256}
    more = {
        "MatMul-free LM (BitGLU)": ternary,
        "MatMul-free LM with LookupGLU, 2.5 units a feature": ternary
        | {"mlp": "lookup_glu", "lookup_glu": {"hidden": 960}},
        "the same, gates of shifts in the token mixer": ternary
        | {"mlp": "lookup_glu", "lookup_glu": {"hidden": 960}, "gates": "shift"},
    }
    lines = ["One token of nanoGPT's character model, 65 characters, at a context of 256.", ""]
    lines += common.markdown(HEADER, rows("gpt_char.py:nanogpt", 65, {}, more))
    lines += ["", "One image of I-ViT-T at 224 pixels, 10 classes; integers only.", ""]
    lines += common.markdown(HEADER, rows("vit_cifar.py:paper", 10, {"image_size": 224}, {}))
    common.write_lines(args.out / "blocks_costs.md", lines)


if __name__ == "__main__":
    cli.run(lambda _: main())
