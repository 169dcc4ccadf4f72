"""python -m quweit_jax train --config=experiments/configs/gpt_char.py:quick --workdir=runs/x"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quweit_jax.commands import cli
from quweit_jax.config import load_file, set_value
from quweit_jax.errors import InputError
from quweit_jax.reading import check_local, check_readable

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from quweit_jax.training.loop import Result
    from quweit_jax.training.setup import Setup
    from quweit_jax.training.stores import Copy
    from quweit_jax.training.teacher import Teacher


def main(argv: Sequence[str]) -> int:
    """Trains, or goes on with what is in the run directory."""
    description = "Trains a model, or goes on with the run in --workdir where it ended."
    parser = cli.parser("train", description, "workdir")
    parser.add_argument(
        "--config",
        help="FILE.py[:VARIANT,key=value,...]; leave it out to go on with an existing run",
    )
    parser.add_argument(
        "--progress",
        choices=["auto", "on", "off"],
        default="auto",
        help="the progress bar (auto: on a terminal)",
    )
    parser.epilog = (
        "--config.PATH=VALUE sets any key of the config, such as --config.steps=500 or "
        "--config.model.width=256."
    )
    args, overrides = cli.parse(parser, argv)
    from quweit_jax.training import hosts, stores

    if not stores.is_address(args.workdir):
        return _train(args, overrides, Path(args.workdir), None)
    cli.join_processes()
    with contextlib.ExitStack() as stack:
        with hosts.together():
            copy = stack.enter_context(stores.mirrored(args.workdir))
        return _train(args, overrides, copy.local, copy)


def _train(
    args: argparse.Namespace, overrides: Mapping[str, str], workdir: Path, copy: Copy | None
) -> int:
    """Trains in a folder; copy: where what it holds is taken whenever a checkpoint is whole."""
    import jax

    from quweit_jax.training import checkpoints, hosts, loop, rundir

    checkpoints.check_path(workdir)
    check_readable(workdir, "--workdir")
    if args.config is None and not os.path.exists(workdir / "config.json"):
        raise InputError(
            f"--config: expected an experiment file to begin a run in {workdir}, such as "
            "--config=experiments/configs/gpt_char.py:quick."
        )
    config = load_file(args.config) if args.config else rundir.read_config(workdir)
    for path, text in overrides.items():
        set_value(config, path, text)
    if copy is None:
        cli.join_processes()
    begin = initial(config.get("init_from") or "", workdir)
    source = teacher(config.get("teacher") or "")
    # How the devices of earlier starts were laid out is no question for those that are here now.
    mesh = None if args.config else rundir.mesh_here(config, overrides)

    def push() -> None:
        if copy is not None and jax.process_index() == 0:
            copy.push()
        hosts.wait_for_all("quweit_jax: taken to the store")

    cli.keep_memory()
    result = loop.fit(
        config,
        workdir,
        progress={"auto": None, "on": True, "off": False}[args.progress],
        initial=begin,
        teacher=source,
        announce=lambda setup: announce(setup, workdir),
        mesh=mesh,
        saved=None if copy is None else push,
        apart=copy is not None,
    )
    if copy is not None:
        push()  # the loss curve, and what else the end has written
    summarize(result, workdir, args.workdir)
    # What a shell would have done after this, `train && report`, it does not do after Ctrl-C.
    return cli.INTERRUPTED if result.signal == "SIGINT" and not result.complete else 0


def initial(
    path: str, workdir: Path
) -> Callable[[Mapping[str, PyTree]], Mapping[str, PyTree]] | None:
    """`init_from`: a function from a new run's variables to those it begins with; what fits is
    taken from `path`, the rest stays, and both are told.

    Args:
      path: a run directory (its best checkpoint is taken), a published checkpoint or what `pack
        --trained` wrote (see `pretrained.transfer.read_source`); '' for none.
      workdir: of the run; one that has checkpoints goes on from those and needs no source.

    Raises:
      InputError: there is nothing at `path`, and the run is a new one.
    """
    import jax

    from quweit_jax.pretrained import transfer
    from quweit_jax.training import rundir, stores

    if not path:
        return None
    place = stores.fetched(path, "init_from").expanduser()
    if not rundir.has_checkpoints(workdir):
        _check_exists(place)

    def begin(fresh: Mapping[str, PyTree]) -> Mapping[str, PyTree]:
        with _named("init_from"):
            if _is_run(place):
                source = jax.device_get(rundir.open_run(place, data=False).variables)
            else:
                source = transfer.read_source(place)
        merged, report = transfer.merge(jax.device_get(fresh), source)
        if jax.process_index() == 0:
            print(report.describe(), flush=True)
        return merged

    return begin


def teacher(path: str) -> Teacher | None:
    """`config.teacher`: the model that a student learns from.

    Args:
      path: a run directory (its best checkpoint is taken), or what the commands' --model takes: a
        published checkpoint, a folder that `pack` wrote, or a name; '' for none.

    Raises:
      InputError: there is nothing at `path`, or it cannot be read.
    """
    import jax

    from quweit_jax.pretrained import folders
    from quweit_jax.training import rundir, stores
    from quweit_jax.training.teacher import Teacher

    if not path:
        return None
    place = stores.fetched(path, "teacher").expanduser()
    with _named("teacher"):
        if _is_run(place):
            run = rundir.open_run(place, data=False)
            labels, variables = run.setup.data.labels, jax.device_get(run.variables)
            return Teacher(run.setup.model, variables, run.setup.tokenizer, labels)
        check_local(place, "teacher", "copy it to a folder first")
        found = folders.find(str(place), speaks=False)
        labels = () if found.published else tuple(found.about.get("labels") or ())
        return Teacher(found.model, found.read(), found.tokenizer, labels)


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """What is wrong with a source is told with the key that names it, not with another's."""
    try:
        yield
    except InputError as error:
        message = str(error)
        for other in ("--workdir: ", "--model: ", "pretrained: "):
            message = message.removeprefix(other)
        raise type(error)(f"{key}: {message}") from None


def _check_exists(place: Path) -> None:
    check_local(place, "init_from", "copy it to a folder first")
    if not os.path.exists(place):  # of any name, also one too long for a system
        raise InputError(
            f"init_from: nothing at {place}; give a run directory, a folder with a published "
            "checkpoint, or its weights file."
        )


def _is_run(place: Path) -> bool:
    return os.path.isfile(place / "environment.json")


def announce(setup: Setup, workdir: Path) -> None:
    """Says in one line what is about to happen, and in another which devices stay idle."""
    import jax

    from quweit_jax.training import checksums

    if jax.process_index():
        return
    config = setup.config
    data, mlp = config.data, f", mlp {config.model.mlp}" if "mlp" in config.model else ""
    mlp += ", integer-only" if config.model.get("integer") else ""
    mlp += f", with {config.teacher} as its teacher" if config.get("teacher") else ""
    name = data.name if data.source == "tfds" else data.path or data.source
    saved = checksums.steps(workdir)
    there = f", where step {saved[-1]} is saved" if saved else ""
    print(
        f"training {config.model.name}{mlp} on {name}: {config.steps} steps of "
        f"{config.batch_size}, {setup.mesh.size} {jax.default_backend()} device(s), into "
        f"{workdir}{there}",
        flush=True,
    )
    if idle := jax.device_count() - setup.mesh.size:
        shape = " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items() if size > 1)
        at_a_time = config.batch_size // config.grad_accum
        print(
            f"{idle} of {jax.device_count()} devices stay idle: {at_a_time} examples at a time are "
            f"divided over {shape or 1}; another --config.batch_size or --config.mesh.* uses more",
            flush=True,
        )


def summarize(result: Result, workdir: Path, name: str = "") -> None:
    """Says the validation loss, a sample, where the plot is, and the line that goes on."""
    import jax

    from quweit_jax.data import pipeline
    from quweit_jax.deploy.pack import describe, describe_lines, packed_or_trained
    from quweit_jax.models import stack

    if jax.process_index():
        return
    setup, config = result.setup, result.setup.config
    where = shlex.quote(f"--workdir={name or workdir}")
    resume = f"python -m quweit_jax.train {where}"
    if not result.complete:
        print(f"stopped at step {result.step} of {config.steps}, saved. To go on: {resume}")
        return
    if found := result.validation:
        accuracy = "" if setup.tokenizer is not None else f", accuracy {found['accuracy']:.2%}"
        print(f"step {result.step}: validation loss {found['loss']:.4f}{accuracy}")
    for name in ("train", "validation"):
        if bad := pipeline.left_out(getattr(setup.data, name)):
            index, reason = min(bad.items())
            split = name.replace("train", "training")
            print(
                f"left out: {len(bad)} {split} image(s) that cannot be used, such as index "
                f"{index} ({reason})"
            )
    if jax.process_count() > 1:
        # the parameters are spread over processes; other commands read them from the checkpoint
        return
    variables = stack.unstacked(jax.device_get(result.state.variables()))
    setup = setup.unscanned()
    packed = packed_or_trained(setup.model, variables, setup.init_inputs)
    if "packed" in packed:
        print("\n".join(describe_lines(describe(setup.model, packed, setup.init_inputs))))
    print(f"loss curve: {workdir / 'plots' / 'loss.png'}")
    longer = f"longer training: {resume} --config.steps={2 * result.step}"
    if setup.tokenizer is not None and config.sample_tokens:
        print(f"sample:\n{'-' * 72}\n{sample(result, variables)}\n{'-' * 72}")
        longer = f"more text: python -m quweit_jax.generate {where}   {longer}"
    print(longer)


def sample(result: Result, variables: dict[str, PyTree]) -> str:
    """A text of `config.sample_tokens` tokens after the beginning of the validation text."""
    import numpy as np

    from quweit_jax.deploy.generate import generate_tokens, stream_text

    setup, config, tokenizer = result.setup.unscanned(), result.setup.config, result.setup.tokenizer
    assert tokenizer is not None
    prompt = np.asarray(setup.data.validation[0]["inputs"][:16])
    tokens = generate_tokens(setup.model, variables, prompt, config.sample_tokens, seed=config.seed)
    return tokenizer.decode(prompt) + "".join(stream_text(tokenizer, tokens, prompt))
