"""What a run says and writes down while it trains: rows of metrics, the progress bar, how far it
is.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from quweit_jax.errors import RunError, needed
from quweit_jax.training import metrics, tracking
from quweit_jax.training.meter import Meter
from quweit_jax.training.optimizers import make_schedule
from quweit_jax.training.setup import Setup

with needed("to train"):
    from tqdm import tqdm


class Log:
    """The rows of metrics.jsonl and what is said meanwhile; the mean of the losses since the last
    row, and the seconds, are carried along by checkpoints (`state`).

    progress: show a bar; None: on a terminal; False: say nothing at all.
    """

    def __init__(
        self,
        setup: Setup,
        workdir: Path,
        start: int,
        saved: Mapping[str, Any],
        progress: bool | None,
    ):
        self.config, self.start, self.last_good = setup.config, start, start
        leader, rates = jax.process_index() == 0, setup.optimizer_config
        self.meter = Meter(setup)
        self.writer = metrics.NoMetrics()
        if leader:
            also = tracking.trackers(self.config, workdir)
            self.writer = metrics.MetricsWriter(workdir, start, also)
        self.schedule: optax.Schedule = make_schedule(
            rates, rates.learning_rate, setup.config.steps, rates.min_ratio
        )
        self.pending: list[list[float]] = saved.get("pending", [])
        self.seconds: float = saved.get("seconds", 0.0)
        self.since = time.monotonic()
        self.speak = leader and progress is not False
        self._shown: dict[str, float] = {}
        self._running: tuple[int, Mapping[str, jax.Array]] | None = None
        self.bar = None
        if leader and (sys.stderr.isatty() if progress is None else progress):
            self.bar = tqdm(
                total=self.config.steps * self.meter.units,
                initial=start * self.meter.units,
                unit="tok" if setup.tokenizer is not None else "ex",
                unit_scale=True,
                dynamic_ncols=True,
                smoothing=0.05,
                desc="train",
            )

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if self.bar is not None:
            self.bar.close()
        self.writer.close()

    def elapsed(self) -> float:
        """Seconds of training so far, over all resumes."""
        return self.seconds + time.monotonic() - self.since

    def train_step(self, step: int, values: Mapping[str, jax.Array]) -> None:
        """Notes that a step was started, and reads the metrics of the one before."""
        self.read()
        self._running = step, values
        if self.bar is not None:
            if self.meter.take_compiled():
                self.bar.unpause()  # that time is none of the time left
            self.bar.update(self.meter.units)

    def read(self) -> None:
        """Waits for the last step and notes its metrics; RunError if they are not finite."""
        if self._running is None:
            return
        (step, running), self._running = self._running, None
        values = {name: float(value) for name, value in running.items()}
        self.meter.lap()
        self._check_finite(step, values)
        self.pending.append([values["loss"], values["accuracy"]])
        if step % self.config.log_every == 0:
            loss, accuracy = map(float, np.mean(np.asarray(self.pending, np.float64), axis=0))
            self.pending = []
            row = {"step": step, "split": "train", "loss": loss, "accuracy": accuracy}
            row |= {"grad_norm": values["grad_norm"]}
            row |= {name: v for name, v in values.items() if name.startswith("distill/")}
            row |= {
                "learning_rate": float(np.asarray(self.schedule(step - 1))),
                "seconds": self.elapsed(),
            }
            measured = self.meter.take()
            self.writer.write(row | measured)
            self._shown = measured or self._shown
            if self.bar is not None:
                told = [f"loss {loss:.3f}", *speed(self._shown)[1:]]
                self.bar.set_postfix_str(", ".join(told), refresh=False)

    def _check_finite(self, step: int, values: Mapping[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return
        groups = ", ".join(k.split("/")[1] for k in bad if k.startswith("grad_norm/"))
        updates = ", ".join(k.split("/")[1] for k in bad if k.startswith("update_norm/"))
        where = "gradients are still finite"
        if groups:
            where = f"gradients are not finite in the parameter group(s) {groups}"
        elif updates:
            where += f", but the optimizer's update is not in the parameter group(s) {updates}"
        raise RunError(
            f"step {step}: the loss is {values['loss']}; {where}. {self._kept()}. "
            "Try a smaller --config.optimizer.learning_rate or more --config.optimizer.clip, in a "
            "new --workdir."
        )

    def _kept(self) -> str:
        kept = "there was no checkpoint yet"
        if self.last_good:
            kept = f"the last good checkpoint, of step {self.last_good}, is kept"
        return f"Nothing of it was saved; {kept}"

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Notes an evaluation; where there is no bar (output into a file) also says how far the run
        is. RunError if the loss is not finite.
        """
        loss, steps = values["loss"], self.config.steps
        if not math.isfinite(loss):
            raise RunError(
                f"step {step}: the validation loss is {loss}. {self._kept()}; try a smaller "
                "--config.optimizer.learning_rate in a new --workdir."
            )
        row = {"step": step, "split": "validation", "loss": loss, "accuracy": values["accuracy"]}
        self.writer.write(row | {"seconds": self.elapsed()})
        if self.speak and self.bar is None:
            told = [f"validation loss {loss:.4f}", f"{self.elapsed():.0f} s", *speed(self._shown)]
            if step > self.start and step < steps:
                told.append(f"about {self.left(step):.0f} s left")
            print(f"step {step} of {steps}: {', '.join(told)}", flush=True)

    def left(self, step: int) -> float:
        """Seconds to the last step, by those since the start, without what compiling took."""
        worked = time.monotonic() - self.since - self.meter.compiling
        return max(0.0, worked) / (step - self.start) * (self.config.steps - step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with the same rows, which are on disk after this."""
        self.read()
        self.writer.sync()
        return {"pending": self.pending, "seconds": self.elapsed()}


def speed(row: Mapping[str, float]) -> list[str]:
    """A row's speed for a person: ['52.1k tokens/s', '12 % of it waiting for data', 'MFU 41 %',
    '11.2 GB'], as far as it is known.
    """
    found = []
    for name, value in row.items():
        if name.endswith("_per_second"):
            found.append(f"{tqdm.format_sizeof(value)} {name.removesuffix('_per_second')}/s")
    if row.get("step_seconds"):
        waiting = row["data_wait_seconds"] / row["step_seconds"]
        found.append(f"{min(1.0, waiting):.0%} of it waiting for data")
    if "mfu" in row:
        found.append(f"MFU {row['mfu']:.0%}")
    if "device_bytes" in row:
        found.append(f"{row['device_bytes'] / 1e9:.1f} GB")
    return found
