"""The one train loop, for every model: step, log, evaluate, checkpoint, stop cleanly, go on
exactly.

The order at a step k: its metrics are read while step k + 1 runs; rows up to k are on disk before
checkpoint k is begun; a checkpoint is only begun once step k is known to be finite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from quweit_jax import config as configs
from quweit_jax.data import pipeline
from quweit_jax.errors import InputError, RunError
from quweit_jax.training import files, metrics, optimizers, run, sharding, state
from quweit_jax.training.checkpoints import Checkpoints

Sums = dict[str, jax.Array]
_NEEDS_INITIAL = (
    "init_from: loop.fit needs initial=..., a function that makes the first variables, as the train "
    "command gives it."
)


@dataclasses.dataclass
class Result:
    """How a run ended: the last step, whether it was complete, the state, and the last validation
    loss.
    """

    step: int
    complete: bool
    state: state.TrainState
    parts: run.Parts
    validation: dict[str, float] | None


class StopRequest:
    """True once SIGTERM or SIGINT has come; a second one ends the program at once. A context
    manager that restores the handlers.
    """

    def __init__(self):
        self.signal: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: a notebook's own business
                return self
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(number, self._before[number])

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, step: int, every: int) -> bool:
        """Whether to stop now; several processes decide together, every few steps."""
        if jax.process_count() == 1:
            return self.signal is not None
        if step % every:
            return False
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.signal is not None))))


class Log:
    """Turns the metrics of single steps into rows: the mean loss since the last row, which a
    checkpoint carries along.
    """

    def __init__(
        self,
        writer: metrics.MetricsWriter,
        config: configs.Config,
        schedule: Callable[[int], Any],
        saved: dict[str, Any],
    ):
        self.writer, self.config, self.schedule = writer, config, schedule
        self.pending: list[list[float]] = saved.get("pending", [])
        self.seconds: float = saved.get("seconds", 0.0)
        self.since = time.monotonic()
        self.bar: Any = None
        self.speak, self.start = False, 0

    def elapsed(self) -> float:
        """Seconds of training so far, over all resumes."""
        return self.seconds + time.monotonic() - self.since

    def train_step(self, step: int, values: dict[str, float], last_good: int) -> None:
        """Notes step `step`; RunError if it isn't finite."""
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if bad:
            groups = [k.split("/")[1] for k in bad if k.startswith("grad_norm/")]
            updates = [k.split("/")[1] for k in bad if k.startswith("update_norm/")]
            where = (
                f"gradients are not finite in the parameter group(s) {', '.join(groups)}"
                if groups
                else "gradients are still finite"
            )
            if updates and not groups:
                where += ", but the optimizer's update is not in the parameter group(s) "
                where += ", ".join(updates)
            keep = (
                f"the last good checkpoint, of step {last_good}, is kept"
                if last_good
                else "there was no checkpoint yet"
            )
            raise RunError(
                f"step {step}: the loss is {values['loss']}; {where}. Nothing of it was saved; "
                f"{keep}. "
                "Try a smaller --config.optimizer.learning_rate or more --config.optimizer.clip, "
                "in a new --workdir."
            )
        self.pending.append([values["loss"], values["accuracy"]])
        if step % self.config.log_every == 0:
            mean = np.mean(np.asarray(self.pending, np.float64), axis=0)
            self.pending = []
            row = {
                "step": step,
                "split": "train",
                "loss": float(mean[0]),
                "accuracy": float(mean[1]),
                "grad_norm": values["grad_norm"],
            }
            self.writer.write(
                row | {"learning_rate": float(self.schedule(step - 1)), "seconds": self.elapsed()}
            )
            if self.bar is not None:
                self.bar.set_postfix_str(f"loss {mean[0]:.3f}")

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Notes an evaluation; where there is no bar (output into a file) it is also a line that
        tells how far the run is.
        """
        row = {
            "step": step,
            "split": "validation",
            "loss": values["loss"],
            "accuracy": values["accuracy"],
            "seconds": self.elapsed(),
        }
        self.writer.write(row)
        if self.speak and self.bar is None:
            done, rate = (
                step - self.start,
                (time.monotonic() - self.since) / max(1, step - self.start),
            )
            left = (
                f", about {rate * (self.config.steps - step):.0f} s left"
                if done and step < self.config.steps
                else ""
            )
            print(
                f"step {step} of {self.config.steps}: validation loss {values['loss']:.4f}, "
                f"{self.elapsed():.0f} s{left}",
                flush=True,
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with the same rows."""
        return {"pending": self.pending, "seconds": self.elapsed()}


def evaluate(eval_step: Any, variables: Any, parts: run.Parts, limit: int) -> dict[str, float]:
    """Loss and accuracy on a fixed set of validation batches (0: the whole split)."""
    if limit < 0:
        raise InputError(
            f"batches: expected 0 (the whole validation split) or more, found {limit}."
        )
    batch_size, where = (
        run.eval_batch_size(parts.config, parts.mesh),
        sharding.batch_sharding(parts.mesh),
    )
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = pipeline.eval_batches(parts.dataset.validation, batch_size, limit, **share)
    return state.mean_of_sums(
        [eval_step(variables, sharding.put_batch(batch, where)) for batch in batches]
    )


def fit(
    config: configs.Config,
    workdir: str | Path,
    *,
    progress: bool | None = None,
    on_step: Callable[[int], None] | None = None,
    initial: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Result:
    """Trains to `config.steps`, or until asked to stop; begins where the newest whole checkpoint in
    `workdir` ends.

    Args:
      progress: show a bar; None: on a terminal. on_step: called after each step with its number
        (for tests and notebooks).
      initial: makes the variables a new run begins with from its freshly drawn ones (see
        `quweit_jax.initial`); needed for init_from.

    Raises:
      InputError: something in the config, the data or the directory is wrong; nothing was changed.
      RunError: the loss stopped being finite, or a checkpoint could not be written.
    """
    workdir = Path(workdir).absolute()
    if config.get("init_from") and initial is None and not run.has_checkpoints(workdir):
        raise InputError(_NEEDS_INITIAL)
    parts = run.assemble(config, run.prepare(workdir, config))
    try:
        run.record(workdir, parts)
        with files.sole_user(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
            checkpoints = Checkpoints(workdir, config.keep)
            try:
                result = _fit(parts, checkpoints, progress, on_step, workdir, initial)
            except Exception:
                with contextlib.suppress(
                    Exception
                    # the first trouble is the one to tell; a checkpoint begun before it is still
                    # finished
                ):
                    checkpoints.close()
                raise
            checkpoints.close()
            return result
    except OSError as error:
        reason = (
            f"{error.strerror}: {error.filename}"
            if error.filename
            else str(error.strerror or error)
        )
        raise RunError(
            f"cannot go on in {workdir} ({reason}); the last checkpoint is whole. Free some space "
            "or mend the folder, and run the same command again."
        ) from error


def _fit(
    parts: run.Parts,
    checkpoints: Checkpoints,
    progress: bool | None,
    on_step: Callable[[int], None] | None,
    workdir: Path,
    initial: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> Result:
    config, leader = parts.config, jax.process_index() == 0
    restored = checkpoints.restore(parts.abstract_state())
    if (
        restored is None and config.get("init_from") and initial is None
    ):  # there were checkpoints, but no whole one
        raise InputError(_NEEDS_INITIAL)
    current, saved, start = restored if restored is not None else (parts.init_state(initial), {}, 0)
    if start > config.steps:
        raise InputError(
            f"steps: {workdir} is already at step {start}, past the {config.steps} asked for; "
            "raise --config.steps or use a new --workdir."
        )
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = pipeline.train_batches(
        parts.dataset.train, config.batch_size, config.seed, prefetch=config.prefetch, **share
    )
    if "data" in saved:
        batches.set_state(saved["data"])
    writer = metrics.MetricsWriter(workdir, start) if leader else metrics.NoMetrics()
    rates = parts.optimizer_config
    schedule = optimizers.make_schedule(rates, rates.learning_rate, config.steps, rates.min_ratio)
    log = Log(writer, config, schedule, saved)
    log.speak, log.start = leader and progress is not False, start
    log.bar = _bar(parts, start, leader if progress is None else progress and leader, progress)
    try:
        with StopRequest() as stop:
            return _steps(
                parts,
                current,
                start,
                batches,
                checkpoints,
                log,
                stop,
                saved.get("validation"),
                on_step,
            )
    finally:
        if log.bar is not None:
            log.bar.close()
        writer.close()


def _steps(
    parts: run.Parts,
    current: state.TrainState,
    start: int,
    batches: Any,
    checkpoints: Checkpoints,
    log: Log,
    stop: StopRequest,
    validation: dict[str, float] | None,
    on_step: Callable[[int], None] | None,
) -> Result:
    config, where = parts.config, sharding.batch_sharding(parts.mesh)
    train_step = parts.train_step(jax.tree.map(lambda x: x.sharding, current))
    eval_step = state.make_eval_step(parts.model.apply)
    running: tuple[int, Sums] | None = None
    last_good, step, stopping = start, start, False

    def read() -> None:
        nonlocal running
        if running is not None:
            number, values = running
            running = None
            log.train_step(number, {k: float(v) for k, v in values.items()}, last_good)

    for step in range(start + 1, config.steps + 1):
        current, values = train_step(current, sharding.put_batch(next(batches), where))
        read()
        running = (step, values)
        if log.bar is not None:
            log.bar.update(1)
        if on_step is not None:
            on_step(step)
        stopping = stop.agreed(step, config.log_every)
        last = step == config.steps
        score = None
        if step % config.eval_every == 0 or last:
            read()
            validation = evaluate(eval_step, current.variables(), parts, config.eval_batches)
            score = validation["loss"]
            if not math.isfinite(score):
                raise RunError(
                    f"step {step}: the validation loss is {score}. Nothing of it was saved; the "
                    f"checkpoint of step {last_good} is kept."
                )
            log.validation(step, validation)
        if step % config.checkpoint_every == 0 or last or stopping:
            read()
            log.writer.sync()
            loop = {"data": _joined_state(batches), "validation": validation, **log.state()}
            checkpoints.save(step, current, loop, score)
            last_good = step
        if stopping:
            break
    checkpoints.wait()
    if jax.process_index() == 0:
        log.writer.sync()
        rows = metrics.read_rows(log.writer.path)
        unit = "nats per token" if parts.tokenizer is not None else "nats"
        metrics.plot_losses({"": rows}, log.writer.path.parent / "plots" / "loss.png", unit=unit)
    return Result(step, step >= config.steps, current, parts, validation)


def _joined_state(batches: Any) -> dict[str, Any]:
    """The data iterator's state, of all processes together: what one of them saves."""
    state = batches.get_state()
    if jax.process_count() == 1:
        return state
    from jax.experimental import multihost_utils

    raw = np.frombuffer(json.dumps(state).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.asarray(raw.size))))
    gathered = multihost_utils.process_allgather(
        np.pad(raw, (0, longest - raw.size), constant_values=ord(" "))
    )
    return pipeline.join_states([json.loads(bytes(row)) for row in np.asarray(gathered)])


def _bar(parts: run.Parts, start: int, show: bool, asked: bool | None) -> Any:
    config = parts.config
    tokens = parts.dataset.tokenizer is not None
    units = config.batch_size * (config.model.context if tokens else 1)
    if not show or (asked is None and not sys.stderr.isatty()):
        return None
    bar = tqdm(
        total=config.steps * units,
        initial=start * units,
        unit="tok" if tokens else "ex",
        unit_scale=True,
        dynamic_ncols=True,
        smoothing=0.05,
        desc="train",
    )
    return _Scaled(bar, units)


class _Scaled:
    """A bar that is told steps and shows tokens (or examples) a second and the time left."""

    def __init__(self, bar: Any, units: int):
        self._bar, self._units = bar, units

    def update(self, steps: int) -> None:
        self._bar.update(steps * self._units)

    def set_postfix_str(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        self._bar.close()
