"""Which token mixer can look up what it has read (MQAR; experiments/configs/recall.py)? Every kind
learns texts of 4 pairs of key and value, goes on with 16, and then with 64: few are learned first,
and from there the mechanism is known.

    python -m experiments.studies.recall [--kinds attention gated_delta ...] [--pairs 4 16 64]
    [--seeds 0] [--table]

Runs go into RUNS/KIND-PAIRS-SEED; finished ones are read, not repeated, interrupted ones go on.
Accuracies are over all 1,000 texts of the validation split, in which a guess is right in 1 of 128.
"""

from __future__ import annotations

from typing import Any

from experiments.configs.recall import KINDS, PAIRS
from experiments.studies import common
from quweit_jax.commands import cli
from quweit_jax.training import metrics


def train(args: Any, kind: str, seed: int) -> dict[str, float]:
    """The accuracy of a kind at each number of pairs, each run beginning with the one before."""
    found, before = {}, ""
    for pairs in args.pairs:
        argument = f"recall.py:small,kind={kind},pairs={pairs}"
        config = common.run_config(args, argument, {"seed": seed, "init_from": before})
        workdir = common.finish(config, args.runs / f"{kind}-{pairs}-{seed}")
        found[str(pairs)] = metrics.evaluations(workdir)[-1]["accuracy"]
        before = str(workdir)
    return found


def table(found: common.Results, pairs: list[int]) -> list[str]:
    """The lines of the table: means over seeds, and each where there are several.

    found: of a seed, {pairs: accuracy}.
    """
    rows = []
    for kind, seeds in found.items():
        cells = [KINDS[kind][1].replace("_", " ") or "MLGRU", KINDS[kind][2] or "ternary"]
        cells += [common.shares([of[str(number)] for of in seeds.values()], 1) for number in pairs]
        rows.append(cells)
    return common.markdown(["token mixer", "projections", *(f"{n} pairs" for n in pairs)], rows)


def main() -> None:
    """Trains what is missing, a run at a time, then writes the table."""
    args = common.arguments(
        __doc__,
        variant="",
        kinds=list(KINDS),
        seeds=[0],
        runs="recall",
        name="recall",
        more=[("--pairs", {"nargs": "+", "type": int, "default": list(PAIRS)})],
    )
    if not args.table:
        for kind in args.kinds:
            for seed in args.seeds:
                common.note(args, kind, seed, train(args, kind, seed))
    lines = table(common.known(args), args.pairs)
    common.write_lines(args.out / f"{args.name}.md", lines)


if __name__ == "__main__":
    cli.run(lambda _: main())
