"""A study whose kinds each have the best of the same learning rates, over several seeds.

The first seed chooses each kind's rate, by the loss at the end on the validation batches that
training looks at; the other seeds are trained at that rate alone, and every run in a table is
scored on the whole validation split, as trained and as deployed.

Runs go into RUNS/KIND-RATE-SEED. Finished ones are read, not repeated, interrupted ones go on, and
one that another process is at work on is left to it: start a study's command once a core.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.studies import common
from quweit_jax.config import Config
from quweit_jax.training import files, metrics, rundir


class Study:
    """The runs of a study, RUNS/KIND-RATE-SEED, and NAME.json, which holds what is known of them.

    args: of `common.arguments`, with `rates`. config_of: (kind, rate, seed) -> the run's config.
    """

    def __init__(self, args: Any, config_of: Callable[[str, str, int], Config]):
        self.args, self.path = args, args.out / f"{args.name}.json"
        self.config_of = config_of
        for folder in (args.out, args.runs):
            folder.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = {"runs": {}}
        if self.path.exists():
            self.found = json.loads(self.path.read_text(encoding="utf-8"))

    def run_of(self, kind: str, rate: str, seed: int) -> Path:
        """A run's directory."""
        return self.args.runs / f"{kind}-{rate}-{seed}"

    def known(self, kind: str, rate: str, seed: int) -> dict[str, Any] | None:
        """What is known of a run, None if it is not finished."""
        name, workdir = f"{kind}-{rate}-{seed}", self.run_of(kind, rate, seed)
        if name not in self.found["runs"] and rundir.has_checkpoints(workdir):
            steps = rundir.read_config(workdir).steps
            if rundir.is_finished(workdir, steps) and not files.in_use(workdir):
                self._note_run(kind, rate, seed)
        return self.found["runs"].get(name)

    def _note_run(self, kind: str, rate: str, seed: int) -> None:
        workdir = self.run_of(kind, rate, seed)
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
        with self.changed() as found:
            found["runs"].setdefault(f"{kind}-{rate}-{seed}", {}).update(values)

    @contextlib.contextmanager
    def changed(self) -> Iterator[dict[str, Any]]:
        """NAME.json as another process may have left it, to be changed and written."""
        with files.exclusive(self.args.runs):
            if self.path.exists():
                self.found = json.loads(self.path.read_text(encoding="utf-8"))
            yield self.found
            self.found["environment"] = rundir.describe_environment()["versions"]
            files.replace_json(self.path, self.found)

    def train_all(self) -> None:
        """The first seed at every rate, then the other seeds at each kind's best."""
        args = self.args
        for kind in args.kinds:
            for rate in args.rates:
                self.train(kind, rate, args.seeds[0])
        for seed in args.seeds[1:]:
            for kind in args.kinds:
                if rate := self.best_rate(kind):
                    self.train(kind, rate, seed)

    def train(self, kind: str, rate: str, seed: int) -> bool:
        """Trains a run, or finds it finished; False if another process is at work on it."""
        workdir = self.run_of(kind, rate, seed)
        if self.known(kind, rate, seed):
            return True
        if files.in_use(workdir):
            return False
        common.finish(self.config_of(kind, rate, seed), workdir)
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
            self.note(kind, rate, seed, **common.score(self.run_of(kind, rate, seed)))
            known = self.known(kind, rate, seed)
        return known

    def scores(self, kind: str) -> list[dict[str, Any]]:
        """The scores of all seeds that are trained at the kind's best rate."""
        return [found for seed in self.args.seeds if (found := self.scored(kind, seed))]

    def columns(self, kind: str, measure: str) -> list[str] | None:
        """Of a kind's row: its mean and error, each seed, the mean as deployed, its rate and what
        the first seed ends at by rate; None if nothing of it is finished at its best rate.
        """
        rate, scores, tried = self.best_rate(kind), self.scores(kind), self.losses(kind)
        if rate is None or not scores:
            return None
        return [
            common.mean_and_error([s[measure] for s in scores]),
            ", ".join(f"{s[measure]:.4f}" for s in scores),
            common.mean_and_error([s[f"{measure}_deployed"] for s in scores]),
            rate,
            " / ".join(f"{tried[r]:.3f}" if r in tried else "-" for r in self.args.rates),
        ]

    def header(self, measure: str) -> list[str]:
        """The names of `columns`."""
        return [
            f"{measure}, mean of seeds",
            "each seed",
            "as deployed",
            "rate",
            f"loss at {' / '.join(self.args.rates)}, first seed",
        ]
