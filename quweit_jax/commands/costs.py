"""python -m quweit_jax costs --config=experiments/configs/vit_cifar.py:paper [--json]
    [--config.a.b=v]
python -m quweit_jax costs --workdir=runs/x|--model=FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quweit_jax.commands import cli
from quweit_jax.commands.opening import add_model
from quweit_jax.config import Config, load_file, set_value
from quweit_jax.errors import InputError

if TYPE_CHECKING:
    import jax
    from jaxtyping import PyTree

    from quweit_jax.training.setup import Setup
    from quweit_jax.training.state import TrainState


def main(argv: Sequence[str]) -> int:
    """Counts what one inference of a config, a run or a model costs, without data and arrays."""
    args, overrides = cli.parse(_parser(), argv)
    if args.outputs is not None and args.outputs < 1:
        raise InputError(f"--outputs: expected at least 1, found {args.outputs}.")
    from quweit_jax.costs import fpga, table

    given, image_shape = args.config or args.workdir or args.model, None
    if args.model is not None:
        config, outputs, image_shape = of_model(args.model)
        if args.outputs is not None or args.memory:
            option = "--outputs" if args.outputs is not None else "--memory"
            raise InputError(f"{option}: does not go with --model; leave it out.")
    elif args.config is not None:
        config, outputs = load_file(args.config), args.outputs
    else:
        config, outputs = of_run(args.workdir, args.outputs)
    for path, text in overrides.items():
        set_value(config, path, text)
    pairs = [pair.partition("=")[::2] for pair in args.levels.split(",") if pair]
    settings = {
        "lut_model": args.lut_model,
        "levels": dict(pairs),
        "active_bits": args.active_bits,
        "tables_in_place": args.tables_in_place,
    }
    result, counted = table.account(
        config,
        args.technology.split(","),
        outputs,
        context=args.context,
        precision=args.precision,
        image_shape=image_shape,
        **settings,
    )
    drawn = {"input_bits": args.input_bits, "pipeline": args.pipeline}
    if area := fpga.of_config(config, outputs, **drawn):
        result["fpga"] = fpga.statement(area, **drawn)
    if args.memory:
        result["training_memory"] = training_memory(config, outputs)
    print(
        json.dumps(result)
        if args.json
        else table.render(result, given, counted if args.layers else None)
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "costs",
        "Counts what one image or one token costs: operations, look-ups, bytes and energy, beside "
        "the dense baseline.",
        "json",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="FILE.py[:VARIANT,key=value,...]")
    source.add_argument("--workdir", help="a run directory instead")
    add_model(source)
    parser.add_argument(
        "--outputs",
        type=int,
        help="classes or vocabulary (default: the run's, or those of a known data set)",
    )
    parser.add_argument(
        "--context",
        type=int,
        help="of a language model, the tokens attended to (default: all its context)",
    )
    parser.add_argument(
        "--precision",
        help="of dense products: float32, bfloat16, float16 or int8 (default: the model's)",
    )
    parser.add_argument(
        "--technology",
        default="45nm,7nm",
        help="named tables or JSON files, joined by commas (default: 45nm,7nm)",
    )
    parser.add_argument("--lut_model", default="multiplexer", help="multiplexer (gates) or fpga")
    parser.add_argument(
        "--levels",
        default="",
        help="where things lie: weights=sram_1mb,activations=sram_32kb,state=dram",
    )
    parser.add_argument(
        "--active_bits",
        type=float,
        default=1.0,
        help="share of a conditional sum's bits that are set (default: 1, all)",
    )
    parser.add_argument(
        "--tables_in_place",
        action="store_true",
        help="tables and wiring are part of the circuit: they don't move",
    )
    parser.add_argument(
        "--input_bits",
        type=int,
        default=8,
        help="of a classifier of tables on an FPGA: bits of an input (default: 8)",
    )
    parser.add_argument(
        "--pipeline",
        type=int,
        default=1,
        help="and registers after every so many stages; 0 for none (default: 1)",
    )
    parser.add_argument("--layers", action="store_true", help="every layer's row")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="compile the training step too, and tell its memory with and without remat",
    )
    parser.epilog = (
        "--config.PATH=VALUE sets any key of the config, as does key=value behind its colon: "
        "model.weightless.sum=grouped."
    )
    return parser


def of_run(workdir: str, outputs: int | None = None) -> tuple[Config, int | None]:
    """A run's config and, of a language model, the size of its vocabulary; `outputs` overrules it.

    Raises:
      InputError: there is no run.
    """
    from quweit_jax.training import rundir, stores

    place = stores.fetched(workdir)
    config = rundir.read_config(place)
    tokenizer = rundir.read_tokenizer(place) if outputs is None else None
    return config, outputs if tokenizer is None else tokenizer.vocab_size


def of_model(given: str) -> tuple[Config, int, tuple[int, int] | None]:
    """The config of a model that `opening.find_model` finds, its outputs, and of a classifier of
    images their side and channels. Of a published language model no tokenizer is needed.

    Raises:
      InputError: there is none.
    """
    from quweit_jax.commands.opening import config_of, find_model

    found = find_model(given, speaks=False)
    config, outputs = config_of(found)
    shape = found.about.get("input_shape", ())
    images = found.tokenizer is None and len(shape) == 4
    return config, outputs, (shape[1], shape[3]) if images else None


def training_memory(
    config: Config,
    outputs: int | None = None,
    compiler_options: Mapping[str, str | bool] | None = None,
) -> dict[str, dict[str, int]]:
    """Bytes of a training step on this machine's first device: {'without remat': {'parameters':
    ..., 'total': ...}, 'with remat': ...}; a model without remat has one entry, 'as configured'.

    See `costs.memory.TrainingMemory`. XLA for a CPU doesn't order what is computed again so that
    memory is saved: there only 'activations' tells what remat is worth. outputs: see
    `costs.count.data_shape`.
    """
    from quweit_jax.costs.count import data_shape

    known = data_shape(config, outputs=outputs)
    shape = None
    if known.image_size is not None:
        shape = (known.image_size, known.image_size, known.channels)
    forms: dict[str, dict[str, bool]] = {"as configured": {}}
    if "remat" in config.model:
        forms = {"without remat": {"remat": False}, "with remat": {"remat": True}}
    return {
        name: _bytes(config, form, known.outputs, shape, compiler_options)
        for name, form in forms.items()
    }


def _bytes(
    config: Config,
    form: Mapping[str, bool],
    outputs: int,
    image_shape: tuple[int, int, int] | None,
    compiler_options: Mapping[str, str | bool] | None,
) -> dict[str, int]:
    import jax
    import numpy as np

    from quweit_jax.costs import memory
    from quweit_jax.data.pipeline import Dataset
    from quweit_jax.training.setup import assemble

    config = config.copy_and_resolve_references().unlock()
    config.model.update(form)
    config.mesh.update(data=1, fsdp=1, tensor=1)
    if image_shape is None:
        inputs = targets = np.zeros((config.model.context,), np.int32)
    else:
        inputs, targets = np.zeros(image_shape, np.float32), np.zeros((), np.int32)
    example = {"inputs": inputs, "targets": targets}
    data = Dataset([example], [], outputs, "", image_shape=image_shape)
    setup = assemble(config.lock(), data=data, training=False, devices=jax.devices()[:1])
    before, batch = setup.abstract_state(), setup.abstract_batch()
    lowered = setup.train_step(before).lower(before, batch)  # type: ignore[attr-defined]
    compiled = lowered.compile(compiler_options=compiler_options)
    needed = memory.of_training(before, batch, compiled, _activations(setup, before, batch))
    return dataclasses.asdict(needed) | {"total": needed.total}


def _activations(
    setup: Setup, before: TrainState, batch: Mapping[str, jax.ShapeDtypeStruct]
) -> int:
    """Bytes kept for the backward pass of one part of a batch that is read in `grad_accum`."""
    import jax

    from quweit_jax.costs import memory
    from quweit_jax.training import losses, state

    part = {
        k: jax.ShapeDtypeStruct((x.shape[0] // setup.config.grad_accum, *x.shape[1:]), x.dtype)
        for k, x in batch.items()
    }
    mutable = [name for name in state.MUTABLE if name in before.constants]

    def loss(params: PyTree, constants: PyTree, batch: PyTree, key: jax.Array) -> jax.Array:
        variables = {"params": params, **constants}
        rngs = {"dropout": jax.random.wrap_key_data(key)}
        logits, _ = setup.model.apply(
            variables, batch["inputs"], train=True, mutable=mutable, rngs=rngs
        )
        return losses.cross_entropy(logits, batch["targets"])["loss"]

    return memory.kept_for_backward(loss, before.params, before.constants, part, before.rng)
