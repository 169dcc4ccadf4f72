"""Which channel mixer is best? Every kind in the same model, on the same batches, at the best of
the same learning rates, over several seeds.

    python -m experiments.studies.blocks --data_dir=FOLDER [--kinds dense lookup_glu ...]
    [--rates 1e-3 2e-3 4e-3 8e-3] [--seeds 0 1 2] [--table]

How rates and seeds are chosen, and where runs go, is in tuned.py. NAME.json keeps what was found as
it comes; --table writes the table and the plot from what is finished ('-' stands for what is not),
and trains nothing.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

from experiments.studies import common
from experiments.studies.block_kinds import DEFAULT, KINDS
from experiments.studies.tuned import Study
from quweit_jax.commands import cli
from quweit_jax.config import Config, flat, load_file
from quweit_jax.costs import count
from quweit_jax.errors import InputError
from quweit_jax.ops.counts import Costs


def kinds_of(config: Config) -> list[str]:
    """The kinds whose changes the config has keys for: a ViT has no option for its start (it is
    unit variance), no GPT computes in integers alone, and gates are MatMul-free's.
    """
    known = flat(config)
    return [kind for kind, (_, changes) in KINDS.items() if changes.keys() <= known.keys()]


def title(kind: str, image: bool) -> str:
    """What the table and the plot call a kind."""
    name = KINDS[kind][0]
    return name.partition(", nanoGPT's")[0] if image else name


def config_of(args: Any, kind: str, rate: str, seed: int) -> Config:
    """A run's config."""
    changes = {"seed": seed, "optimizer.learning_rate": float(rate), **KINDS[kind][1]}
    return common.run_config(args, args.config, changes)


def block_costs(config: Config, outputs: int) -> Costs:
    """The costs of the first block's channel mixer and its norm, matrices in int8."""
    size = {"image_size": config.data.image_size} if config.model.name == "vit" else {}
    counted = count.count(config.model.to_dict(), outputs, precision="int8", **size)
    rows = tuple(row for row in counted.layers if row.name.startswith("block_0/mlp"))
    return Costs(rows, counted.unit, counted.context)


def costs_of(study: Study, kind: str) -> Costs:
    """The costs of a block of a kind that is scored."""
    config = study.config_of(kind, str(study.best_rate(kind)), study.args.seeds[0])
    return block_costs(config, study.scores(kind)[0]["outputs"])


def row(study: Study, kind: str, measure: str) -> list[str] | None:
    """A kind's row of the table, None if nothing of it is finished at its best rate."""
    found = study.columns(kind, measure)
    if found is None:
        return None
    costs = costs_of(study, kind)
    return [
        title(kind, measure == "accuracy"),
        *found,
        f"{sum(costs.bytes_stored.values()):,}",
        f"{costs.total_multiplications:,}",
        f"{sum(costs.additions.values()):,}",
        f"{study.scores(kind)[0]['parameters']:,}",
    ]


def write(study: Study) -> None:
    """NAME.md and NAME.png, of what is finished."""
    args = study.args
    first = study.config_of(args.kinds[0], args.rates[0], args.seeds[0])
    image = first.model.name == "vit"
    measure = "accuracy" if image else "loss"
    header = [
        "channel mixer",
        *study.header(measure),
        "bytes a block (matrices in int8)",
        "multiplications",
        "additions",
        "parameters of the model",
    ]
    rows = [row(study, kind, measure) for kind in args.kinds]
    lines = common.markdown(header, [cells for cells in rows if cells])
    common.write_lines(args.out / f"{args.name}.md", lines)
    draw(study, [kind for kind, cells in zip(args.kinds, rows) if cells], measure)


def draw(study: Study, kinds: list[str], measure: str) -> None:
    """NAME.png: each kind's seeds, the band between them and their mean, as deployed, the best at
    the top, with the bytes of a block beside it. A control far behind the others is not drawn, but
    named.
    """
    args, image = study.args, measure == "accuracy"
    values = {k: [s[f"{measure}_deployed"] for s in study.scores(k)] for k in kinds}
    control = (
        f"; without any: {statistics.mean(values.pop('none')):.3f}" if "none" in values else ""
    )
    sizes = {kind: sum(costs_of(study, kind).bytes_stored.values()) for kind in values}
    common.draw_ends(
        values,
        args.out / f"{args.name}.png",
        {kind: title(kind, image) for kind in values},
        f"validation {measure} as deployed{'' if image else ', nats'}{control}",
        beside={kind: f"{size / 1000:.0f} KB" for kind, size in sizes.items()},
        highest_first=image,
    )


def check(args: Any) -> None:
    """Refuses kinds that the model of --config does not have, before anything is trained."""
    there_are = kinds_of(load_file(f"{common.EXPERIMENTS / 'configs' / args.config}"))
    if wrong := [kind for kind in args.kinds if kind not in there_are]:
        raise InputError(
            f"--kinds: {args.config} has no {', '.join(wrong)}; it has {', '.join(there_are)}."
        )


def main() -> None:
    """Trains what is missing, a run at a time, then writes table and curves."""
    args = common.arguments(
        __doc__,
        variant="",
        kinds=list(KINDS),
        default_kinds=DEFAULT,
        seeds=[0, 1, 2],
        runs="blocks",
        name="blocks_tiny_shakespeare",
        more=[
            ("--config", {"default": "gpt_char.py:nanogpt_cpu", "help": "of experiments/configs"}),
            ("--rates", {"nargs": "+", "default": ["1e-3", "2e-3", "4e-3", "8e-3"]}),
        ],
    )
    check(args)
    study = Study(args, functools.partial(config_of, args))
    if not args.table:
        study.train_all()
    write(study)


if __name__ == "__main__":
    cli.run(lambda _: main())
