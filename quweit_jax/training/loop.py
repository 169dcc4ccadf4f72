"""The one train loop, for every model: step, log, evaluate, checkpoint, stop, go on exactly.

The order at a step k: its metrics are read while step k + 1 runs; rows up to k are on disk before
checkpoint k is begun; a checkpoint is only begun once step k is known to be finite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from quweit_jax.config import Config
from quweit_jax.data import pipeline
from quweit_jax.errors import InputError, RunError, needed
from quweit_jax.training import checksums, metrics, rundir, sharding, state
from quweit_jax.training.checkpoints import Checkpoints
from quweit_jax.training.optimizers import make_schedule
from quweit_jax.training.setup import Setup, Variables, assemble
from quweit_jax.training.stopping import StopRequest, agree
from quweit_jax.training.teacher import Teacher

with needed("to train"):
    from tqdm import tqdm

Initial = Callable[[Variables], Variables]
_Begun = tuple[state.TrainState, Mapping[str, Any], int]
_NEEDS_INITIAL = (
    "init_from: loop.fit needs initial=quweit_jax.commands.train.initial(config.init_from, "
    "workdir), as the train command gives it."
)


@dataclasses.dataclass
class Result:
    """How a run ended: its last step, whether that completes it, the state, the last evaluation,
    and the name of the signal that asked this process to stop.
    """

    step: int
    complete: bool
    state: state.TrainState
    setup: Setup
    validation: dict[str, float] | None
    signal: str | None = None


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
        self.writer = metrics.MetricsWriter(workdir, start) if leader else metrics.NoMetrics()
        self.schedule: optax.Schedule = make_schedule(
            rates, rates.learning_rate, setup.config.steps, rates.min_ratio
        )
        self.pending: list[list[float]] = saved.get("pending", [])
        self.seconds: float = saved.get("seconds", 0.0)
        self.since = time.monotonic()
        self.speak = leader and progress is not False
        self.units = self.config.batch_size
        self.units *= self.config.model.context if setup.tokenizer is not None else 1
        self._running: tuple[int, Mapping[str, jax.Array]] | None = None
        self.bar = None
        if leader and (sys.stderr.isatty() if progress is None else progress):
            self.bar = tqdm(
                total=self.config.steps * self.units,
                initial=start * self.units,
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
            self.bar.update(self.units)

    def read(self) -> None:
        """Waits for the last step and notes its metrics; RunError if they are not finite."""
        if self._running is None:
            return
        (step, running), self._running = self._running, None
        values = {name: float(value) for name, value in running.items()}
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
            self.writer.write(row)
            if self.bar is not None:
                self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

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
            done, left = step - self.start, ""
            if done and step < steps:
                seconds = (time.monotonic() - self.since) / done * (steps - step)
                left = f", about {seconds:.0f} s left"
            print(
                f"step {step} of {steps}: validation loss {loss:.4f}, {self.elapsed():.0f} s{left}",
                flush=True,
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with the same rows, which are on disk after this."""
        self.read()
        self.writer.sync()
        return {"pending": self.pending, "seconds": self.elapsed()}


def evaluate(
    eval_step: state.EvalStep, variables: Variables, setup: Setup, limit: int
) -> dict[str, float]:
    """Loss and accuracy on a fixed set of validation batches (0: the whole split)."""
    if limit < 0:
        raise InputError(
            f"batches: expected 0 (the whole validation split) or more, found {limit}."
        )
    if not len(setup.data.validation):
        raise InputError("evaluate: this run was opened without its data; open it with data=True.")
    where = sharding.batch_sharding(setup.mesh)
    batches = pipeline.eval_batches(
        setup.data.validation, setup.eval_batch_size, limit, **_share_of_process()
    )
    return state.mean_of_sums(
        [eval_step(variables, sharding.put_batch(batch, where)) for batch in batches]
    )


def fit(
    config: Config,
    workdir: str | Path,
    *,
    progress: bool | None = None,
    on_step: Callable[[int], None] | None = None,
    initial: Initial | None = None,
    teacher: Teacher | None = None,
    announce: Callable[[Setup], None] | None = None,
) -> Result:
    """Trains to `config.steps`, or until asked to stop; begins where the newest whole checkpoint in
    `workdir` ends.

    Args:
      progress: show a bar; None: on a terminal. on_step: called after each step with its number.
      initial: makes the variables a new run begins with from its freshly drawn ones (see
        `quweit_jax.commands.train.initial`); needed for init_from.
      teacher: read anew for every start (see `quweit_jax.commands.train.teacher`); needed where
        `config.teacher` names one.
      announce: called once nothing is left to refuse, before the first step.

    Raises:
      InputError: something in the config, the data or the directory is wrong; nothing was changed.
      RunError: the loss stopped being finite, or a checkpoint could not be written.
    """
    workdir = Path(workdir).absolute()
    if config.get("init_from") and initial is None and not rundir.has_checkpoints(workdir):
        raise InputError(_NEEDS_INITIAL)
    with _told(workdir):
        rundir.check_folder(workdir, config)
        tokenizer = rundir.read_tokenizer(workdir)
    setup = assemble(config, tokenizer).with_teacher(teacher)
    with (
        _told(workdir),
        rundir.claimed(workdir, setup),
        Checkpoints(workdir, config.keep) as checkpoints,
    ):
        begun = _begin(setup, checkpoints, workdir, initial)
        if announce is not None:
            announce(setup)
        return _train(setup, checkpoints, workdir, progress, on_step, begun)


@contextlib.contextmanager
def _told(workdir: Path) -> Iterator[None]:
    """What the system refuses in a run directory is a RunError that says what is kept there."""
    try:
        yield
    except OSError as error:
        reason = str(error.strerror or error) + f": {error.filename}" * bool(error.filename)
        raise RunError(
            f"cannot go on in {workdir} ({reason}); {checksums.describe_kept(workdir)}. Free some "
            "space or mend the folder, and run the same command again."
        ) from error


def _train(
    setup: Setup,
    checkpoints: Checkpoints,
    workdir: Path,
    progress: bool | None,
    on_step: Callable[[int], None] | None,
    begun: _Begun,
) -> Result:
    config, where = setup.config, sharding.batch_sharding(setup.mesh)
    current, saved, start = begun
    rundir.write_files(workdir, setup)
    batches = pipeline.train_batches(
        setup.data.train,
        config.batch_size,
        config.seed,
        prefetch=config.prefetch,
        **_share_of_process(),
    )
    if "data" in saved:
        batches.set_state(saved["data"])
    train_step, fit_steps = setup.train_step(current), setup.distill_config.fit_steps
    fit_step = setup.train_step(current, fitting=True) if fit_steps else train_step
    taught = [] if setup.teacher is None else [setup.teacher.variables]
    eval_step = state.make_eval_step(
        setup.model.apply, setup.mesh, setup.loss_pieces(setup.eval_batch_size)
    )
    validation, step = saved.get("validation"), start
    with (
        contextlib.closing(Log(setup, workdir, start, saved, progress)) as log,
        StopRequest() as stop,
    ):
        if start == config.steps and agree(not log.writer.has_evaluation(start)):
            # It was stopped there, or its rows were lost: nothing else would say that it is done.
            validation = evaluate(eval_step, current.variables(), setup, config.eval_batches)
            log.validation(start, validation)
        for step in range(start + 1, config.steps + 1):
            move = fit_step if step <= fit_steps else train_step
            current, values = move(current, sharding.put_batch(next(batches), where), *taught)
            log.train_step(step, values)
            if on_step is not None:
                on_step(step)
            score, last = None, step == config.steps
            if step % config.eval_every == 0 or last:
                log.read()
                validation = evaluate(eval_step, current.variables(), setup, config.eval_batches)
                score = validation["loss"]
                log.validation(step, validation)
            stopping = stop.agreed(step, config.log_every)
            if step % config.checkpoint_every == 0 or last or stopping:
                noted = log.state()
                place = {"data": _joined_state(batches), "validation": validation}
                checkpoints.save(step, current, place | noted, score)
                log.last_good = step
            if stopping:
                break
        checkpoints.wait()
        log.writer.sync()
    if jax.process_index() == 0:
        rows = metrics.read_rows(workdir / "metrics.jsonl")
        unit = "nats per token" if setup.tokenizer is not None else "nats"
        metrics.plot_losses({"": rows}, workdir / "plots" / "loss.png", unit=unit)
    return Result(step, step >= config.steps, current, setup, validation, stop.signal)


def _begin(
    setup: Setup, checkpoints: Checkpoints, workdir: Path, initial: Initial | None
) -> _Begun:
    """The state to go on from, what else its checkpoint holds, and its step."""
    restored = checkpoints.restore(setup.abstract_state())
    if restored is None:
        if setup.config.get("init_from") and initial is None:
            raise InputError(_NEEDS_INITIAL)  # there were checkpoints, but no whole one
        return setup.init_state(initial), {}, 0
    if restored[2] > setup.config.steps:
        raise InputError(
            f"steps: {workdir} is already at step {restored[2]}, past the {setup.config.steps} "
            "asked for; raise --config.steps or use a new --workdir."
        )
    return restored


def _share_of_process() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


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
