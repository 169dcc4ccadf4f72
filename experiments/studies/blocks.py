"""Which channel mixer is best? Every kind in the same model, on the same batches, at the best of
the same learning rates, over several seeds.

    python -m experiments.studies.blocks --data_dir=FOLDER [--kinds dense lookup_glu ...]
    [--rates 1e-3 2e-3 4e-3 8e-3] [--seeds 0 1 2] [--table]

The first seed chooses each kind's rate, by the loss at the end on the validation batches that
training looks at; the other seeds are trained at that rate alone, and every run in the table is
scored on the whole validation split, as trained and as deployed.

Runs go into RUNS/KIND-RATE-SEED. Finished ones are read, not repeated, interrupted ones go on, and
one that another process is at work on is left to it: start the command once a core. NAME.json keeps
what was found as it comes; --table writes the table and the plot from what is finished ('-' stands
for what is not), and trains nothing.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import jax

from experiments.studies import common
from experiments.studies.block_kinds import DEFAULT, KINDS
from quweit_jax.commands import cli
from quweit_jax.config import Config, flat, load_file, set_value
from quweit_jax.costs import count
from quweit_jax.errors import InputError
from quweit_jax.ops.counts import Costs
from quweit_jax.training import files, metrics, rundir


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
    config = load_file(f"{common.EXPERIMENTS / 'configs' / args.config}")
    changes = {"data.data_dir": args.data_dir, "sample_tokens": 0, "seed": seed}
    changes |= {"optimizer.learning_rate": float(rate), **KINDS[kind][1]}
    with config.unlocked():
        config.update_from_flattened_dict(changes)
        if args.steps:
            config.steps = args.steps
    for path, text in args.overrides.items():
        set_value(config, path, text)
    return config


def run_of(args: Any, kind: str, rate: str, seed: int) -> Path:
    """A run's directory."""
    return args.runs / f"{kind}-{rate}-{seed}"


def block_costs(config: Config, outputs: int) -> Costs:
    """The costs of the first block's channel mixer and its norm, matrices in int8."""
    size = {"image_size": config.data.image_size} if config.model.name == "vit" else {}
    counted = count.count(config.model.to_dict(), outputs, precision="int8", **size)
    rows = tuple(row for row in counted.layers if row.name.startswith("block_0/mlp"))
    return Costs(rows, counted.unit, counted.context)


class Study:
    """The runs of a study, and NAME.json, which holds what is known of them."""

    def __init__(self, args: Any):
        self.args, self.path = args, args.out / f"{args.name}.json"
        self.found: dict[str, Any] = {"runs": {}}
        if self.path.exists():
            self.found = json.loads(self.path.read_text(encoding="utf-8"))

    def known(self, kind: str, rate: str, seed: int) -> dict[str, Any] | None:
        """What is known of a run, None if it is not finished."""
        name, workdir = f"{kind}-{rate}-{seed}", run_of(self.args, kind, rate, seed)
        if name not in self.found["runs"] and rundir.has_checkpoints(workdir):
            steps = rundir.read_config(workdir).steps
            if rundir.is_finished(workdir, steps) and not files.in_use(workdir):
                self._note_run(kind, rate, seed)
        return self.found["runs"].get(name)

    def _note_run(self, kind: str, rate: str, seed: int) -> None:
        workdir = run_of(self.args, kind, rate, seed)
        setup = rundir.open_run(workdir, data=False).setup
        shapes = setup.abstract_state().params
        self.note(
            kind,
            rate,
            seed,
            last_loss=metrics.evaluations(workdir)[-1]["loss"],
            seconds=metrics.read_rows(workdir / "metrics.jsonl")[-1]["seconds"],
            parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
            outputs=setup.data.outputs,
        )

    def note(self, kind: str, rate: str, seed: int, **values: Any) -> None:
        """Keeps what was found of a run; another process may have added to the file."""
        args = self.args
        args.out.mkdir(parents=True, exist_ok=True)
        with files.exclusive(args.runs):
            if self.path.exists():
                self.found = json.loads(self.path.read_text(encoding="utf-8"))
            self.found["runs"].setdefault(f"{kind}-{rate}-{seed}", {}).update(values)
            self.found["environment"] = rundir.describe_environment()["versions"]
            files.replace_json(self.path, self.found)

    def train(self, kind: str, rate: str, seed: int) -> bool:
        """Trains a run, or finds it finished; False if another process is at work on it."""
        workdir = run_of(self.args, kind, rate, seed)
        if self.known(kind, rate, seed):
            return True
        if files.in_use(workdir):
            return False
        common.finish(config_of(self.args, kind, rate, seed), workdir)
        self._note_run(kind, rate, seed)
        return True

    def losses(self, kind: str) -> dict[str, float]:
        """What the first seed ended at, by rate; rates not trained yet are left out."""
        found = {rate: self.known(kind, rate, self.args.seeds[0]) for rate in self.args.rates}
        return {rate: known["last_loss"] for rate, known in found.items() if known}

    def best_rate(self, kind: str) -> str | None:
        """The rate at which the first seed ends lowest, of those trained; None without any."""
        losses = self.losses(kind)
        return min(losses, key=lambda rate: losses[rate]) if losses else None

    def scored(self, kind: str, seed: int) -> dict[str, Any] | None:
        """The scores of a seed at its kind's best rate, None if that is not trained yet."""
        rate = self.best_rate(kind)
        known = self.known(kind, rate, seed) if rate else None
        if rate is None or known is None:
            return None
        if "loss_deployed" not in known:
            self.note(kind, rate, seed, **common.score(run_of(self.args, kind, rate, seed)))
            known = self.known(kind, rate, seed)
        return known

    def scores(self, kind: str) -> list[dict[str, Any]]:
        """The scores of all seeds that are trained at the kind's best rate."""
        return [found for seed in self.args.seeds if (found := self.scored(kind, seed))]

    def costs(self, kind: str) -> Costs:
        """The costs of a block of a kind that is scored."""
        config = config_of(self.args, kind, str(self.best_rate(kind)), self.args.seeds[0])
        return block_costs(config, self.scores(kind)[0]["outputs"])


def row(study: Study, kind: str, measure: str) -> list[str] | None:
    """A kind's row of the table, None if nothing of it is finished at its best rate."""
    args, rate = study.args, study.best_rate(kind)
    scores = study.scores(kind)
    if rate is None or not scores:
        return None
    costs, tried = study.costs(kind), study.losses(kind)
    return [
        title(kind, measure == "accuracy"),
        common.mean_and_error([s[measure] for s in scores]),
        ", ".join(f"{s[measure]:.4f}" for s in scores),
        common.mean_and_error([s[f"{measure}_deployed"] for s in scores]),
        rate,
        " / ".join(f"{tried[r]:.3f}" if r in tried else "-" for r in args.rates),
        f"{sum(costs.bytes_stored.values()):,}",
        f"{costs.total_multiplications:,}",
        f"{sum(costs.additions.values()):,}",
        f"{scores[0]['parameters']:,}",
    ]


def write(study: Study) -> None:
    """NAME.md and NAME.png, of what is finished."""
    args = study.args
    first = config_of(args, args.kinds[0], args.rates[0], args.seeds[0])
    image = first.model.name == "vit"
    measure = "accuracy" if image else "loss"
    header = [
        "channel mixer",
        f"{measure}, mean of seeds",
        "each seed",
        "as deployed",
        "rate",
        f"loss at {' / '.join(args.rates)}, first seed",
        "bytes a block (matrices in int8)",
        "multiplications",
        "additions",
        "parameters of the model",
    ]
    rows = [row(study, kind, measure) for kind in args.kinds]
    lines = common.markdown(header, [cells for cells in rows if cells])
    (args.out / f"{args.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
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
    sizes = {kind: sum(study.costs(kind).bytes_stored.values()) for kind in values}
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
    args.runs.mkdir(parents=True, exist_ok=True)
    study = Study(args)
    if not args.table:
        for kind in args.kinds:
            for rate in args.rates:
                study.train(kind, rate, args.seeds[0])
        for seed in args.seeds[1:]:
            for kind in args.kinds:
                if rate := study.best_rate(kind):
                    study.train(kind, rate, seed)
    write(study)


if __name__ == "__main__":
    cli.run(lambda _: main())
