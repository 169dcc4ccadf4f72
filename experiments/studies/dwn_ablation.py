"""What gradient and wiring are worth to a weightless classifier of CIFAR-10 (arXiv 2410.11112, its
ablation): finite differences or extended ones, wiring at random or learned among a few.

    python -m experiments.studies.dwn_ablation --data_dir=FOLDER [--kinds ...] [--seeds 0]
    [--variant=small] [--table]

Finite differences are extended ones of addresses that differ in the one bit alone (beta = 0), at
the magnitude that those have in all (alpha = 1/2). Runs go into RUNS/KIND-SEED; what NAME.json
knows is not repeated, and interrupted ones go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.studies import common
from quweit_jax.commands import cli

_RANDOM: dict[str, object] = {"model.mapping": "random"}
_FINITE: dict[str, object] = {"model.alpha": 0.5, "model.beta": 0.0}
# what the table calls a kind, its changes to the config, the published accuracy
KINDS: dict[str, tuple[str, dict[str, object], str]] = {
    "fd": ("finite differences, wiring at random", _RANDOM | _FINITE, "48.37%"),
    "efd": ("extended finite differences, wiring at random", _RANDOM, "-"),
    "fd_learned": ("finite differences, learned wiring", _FINITE, "55.36%"),
    "efd_learned": ("extended finite differences, learned wiring", {}, "57.42%"),
}


def row(kind: str, seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """A kind's row of the table."""
    name, _, published = KINDS[kind]
    deployed = [found["accuracy_deployed"] for found in seeds]
    kilobytes = seeds[0]["bytes_deployed"] / 1000
    return [name, common.shares(deployed, 2), published, f"{kilobytes:,.0f} KB"]


def train_all(args: Any) -> None:
    """Trains what NAME.json does not know, a run at a time."""
    path = args.out / f"{args.name}.json"
    for seed in args.seeds:
        for kind in args.kinds:
            if path.exists() and seed in common.known(args).get(kind, {}):
                continue
            changes = {"seed": seed, **KINDS[kind][1]}
            config = common.run_config(args, f"dwn_cifar.py:{args.variant}", changes)
            found = common.score(common.finish(config, args.runs / f"{kind}-{seed}"))
            common.note(args, kind, seed, found)
            print(f"{kind}, seed {seed}: {json.dumps(found)}", flush=True)


def main() -> None:
    """Trains what is missing, then writes the table."""
    args = common.arguments(
        __doc__,
        variant="small",
        kinds=list(KINDS),
        seeds=[0],
        runs="dwn_ablation",
        name="dwn_cifar10",
    )
    if not args.table:
        train_all(args)
    header = ["gradient and wiring", "accuracy as deployed", "published", "bytes as deployed"]
    rows = [row(kind, list(seeds.values())) for kind, seeds in common.known(args).items()]
    common.write_lines(args.out / f"{args.name}.md", common.markdown(header, rows))


if __name__ == "__main__":
    cli.run(lambda _: main())
