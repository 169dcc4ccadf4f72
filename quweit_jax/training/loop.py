"""The one train loop, for every model: step, log, evaluate, checkpoint, stop, go on exactly.

The order at a step k: its metrics are read while step k + 1 runs; rows up to k are on disk before
checkpoint k is begun; a checkpoint is only begun once step k is known to be finite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from quweit_jax.config import Config
from quweit_jax.data import pipeline
from quweit_jax.errors import InputError, RunError
from quweit_jax.training import checksums, hosts, metrics, rundir, sharding, state, tracking
from quweit_jax.training.checkpoints import Checkpoints
from quweit_jax.training.log import Log
from quweit_jax.training.profiling import Profile
from quweit_jax.training.setup import Setup, Variables, assemble
from quweit_jax.training.stopping import StopRequest, agree
from quweit_jax.training.teacher import Teacher

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
    mesh: sharding.MeshConfig | None = None,
    saved: Callable[[], None] | None = None,
    apart: bool = False,
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
      mesh: of these devices, instead of the config's, which stays the run's.
      saved: called whenever a checkpoint is whole, which is then waited for.
      apart: each process has a `workdir` of its own with the same content, and only the first one
        writes to it.

    Raises:
      InputError: something in the config, the data or the directory is wrong; nothing was changed.
      RunError: the loss stopped being finite, or a checkpoint could not be written.
    """
    workdir = Path(workdir).absolute()
    if config.get("init_from") and initial is None and not rundir.has_checkpoints(workdir):
        raise InputError(_NEEDS_INITIAL)
    with _told(workdir), hosts.together():
        rundir.check_folder(workdir, config)
        tokenizer = rundir.read_tokenizer(workdir)
        tracking.check(config, installed=True)
        setup = assemble(config, tokenizer, mesh=mesh).with_teacher(teacher)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_told(workdir))
        stack.enter_context(hosts.connected())
        with hosts.together():
            stack.enter_context(rundir.claimed(workdir, setup))
        if not apart:
            hosts.check_shared(workdir)
        checkpoints = stack.enter_context(Checkpoints(workdir, config.keep, apart=apart))
        begun = _begin(setup, checkpoints, workdir, initial)
        if apart:
            hosts.check_same("the newest whole checkpoint", begun[2], "start all of them again")
        if announce is not None:
            announce(setup)
        return _train(setup, checkpoints, workdir, progress, on_step, begun, saved)


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
    whole: Callable[[], None] | None,
) -> Result:
    config, where = setup.config, sharding.batch_sharding(setup.mesh)
    current, saved, start = begun
    rundir.write_files(workdir, setup, start)
    batches = pipeline.train_batches(
        setup.data.train,
        config.batch_size,
        config.seed,
        prefetch=config.prefetch,
        **_share_of_process(),
    )
    if "data" in saved:
        batches.set_state(saved["data"])
    taught = [] if setup.teacher is None else [setup.teacher.variables]
    validation, step = saved.get("validation"), start
    with (
        contextlib.closing(Log(setup, workdir, start, saved, progress)) as log,
        Profile(config.get("profile_steps", ""), workdir) as profile,
        StopRequest() as stop,
    ):
        meter, fit_steps = log.meter, setup.distill_config.fit_steps
        train_step = meter.compiles(setup.train_step(current))
        fit_step = train_step
        if fit_steps:
            fit_step = meter.compiles(setup.train_step(current, fitting=True))
        pieces = setup.loss_pieces(setup.eval_batch_size)
        eval_step = meter.compiles(state.make_eval_step(setup.model.apply, setup.mesh, pieces))
        if start == config.steps and agree(not log.writer.has_evaluation(start)):
            # It was stopped there, or its rows were lost: nothing else would say that it is done.
            validation = evaluate(eval_step, current.variables(), setup, config.eval_batches)
            log.validation(start, validation)
        for step in range(start + 1, config.steps + 1):
            move = fit_step if step <= fit_steps else train_step
            with meter.waiting():
                batch = next(batches)
            with profile.step(step):
                current, values = move(current, sharding.put_batch(batch, where), *taught)
            log.train_step(step, values)
            profile.after(step, values)
            if on_step is not None:
                on_step(step)
            score, last = None, step == config.steps
            if step % config.eval_every == 0 or last:
                log.read()
                with meter.pausing():
                    now = current.variables()
                    validation = evaluate(eval_step, now, setup, config.eval_batches)
                    score = validation["loss"]
                    log.validation(step, validation)
            stopping = stop.agreed(step, config.log_every)
            if step % config.checkpoint_every == 0 or last or stopping:
                noted = log.state()
                with meter.pausing():
                    place = {"data": _joined_state(batches), "validation": validation}
                    checkpoints.save(step, current, place | noted, score)
                    log.last_good = step
                    if whole is not None:
                        checkpoints.wait()
                        whole()
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
