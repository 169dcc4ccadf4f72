"""python -m quweit_jax compile_tpu --config=experiments/configs/matmulfree.py:370m"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quweit_jax.commands import cli
from quweit_jax.config import Config
from quweit_jax.errors import InputError, RunError

_NO_ROOM = re.compile(r"\(([\d.]+[KMG]?)\) exceeds available HBM \(([\d.]+[KMG]?)\)")
_ADVICE = (
    "--config.model.remat=true, --config.model.scan_layers=true, a smaller --config.batch_size or "
    "larger --config.grad_accum, --config.mesh.data=1 --config.mesh.fsdp=-1, or more chips"
)
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
}
_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call")


def main(argv: Sequence[str]) -> int:
    """Compiles a config's training step for chips that are not there, and says what one needs."""
    parser = cli.parser(
        "compile_tpu",
        "Compiles a config's training step for TPUs or GPUs ahead of time; none of them and no "
        "data are needed, but their compiler is: pip install libtpu, or jax-cuda13-plugin and "
        "jax-cuda13-pjrt of JAX's version with --no-deps.",
        "config",
        "json",
    )
    parser.add_argument(
        "--topology", default="v5e:2x4", help="such as v5e:2x4 or v5p:2x2x4; h100:8 or h100:2x8"
    )
    parser.add_argument(
        "--outputs", type=int, help="vocabulary or classes, where the data's are not known"
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="of a language model also the step that `generate` repeats, on one chip, as deployed",
    )
    parser.add_argument(
        "--no-step", dest="step", action="store_false", help="with --decode: that step alone"
    )
    args, overrides = cli.parse(parser, argv)
    if not args.step and not args.decode:
        raise InputError("--no-step: nothing is left to compile; add --decode.")
    # What is at hand is neither asked nor taken; JAX, which reads these, is not imported yet.
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    config = cli.load_config(args.config, overrides)
    facts: dict[str, object] = {}
    if args.step:
        facts = compile_step(config, args.topology, args.outputs)
    if args.decode:
        facts |= compile_decode(config, args.topology, args.outputs)
    cli.print_facts(facts, as_json=args.json)
    return 0


def compile_step(config: Config, topology: str, outputs: int | None = None) -> dict[str, object]:
    """What a chip's part of the compiled training step needs and does.

    bytes of arguments and temporaries, bytes received from other chips by kind of collective,
    the operations of matrix products (those that remat repeats among them), and, of TPUs, the
    compiler's estimate of a step's time, from cycles in which nothing waits for memory or other
    chips; without our own kernels, of which it has none (benchmarks/tpu_kernels.py says what they
    take). At that time a host reads so many tokens a second, the most it can ever need to.

    Raises:
      InputError: the compiler isn't installed, or knows no such topology, or the data's vocabulary
        is not known. RunError: a chip has not enough memory.
    """
    import jax

    from quweit_jax.training.setup import assemble
    from quweit_jax.training.topologies import devices_of

    devices = devices_of(topology)
    setup = assemble(config, data=_data(config, outputs), devices=devices)
    state = setup.abstract_state()
    step: Any = setup.train_step(state)
    facts: dict[str, object] = {
        "topology": topology,
        "chips": len(devices),
        "batch_size": config.batch_size,
        "outputs": setup.data.outputs,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    }
    facts["hosts"] = hosts = len({device.process_index for device in devices})
    made = _compiled(lambda: step.trace(state, setup.abstract_batch()), topology, devices, "step")
    seconds: Any = made.get("estimated_seconds")
    if seconds and setup.tokenizer is not None:
        tokens = config.batch_size * config.model.context
        made["tokens_per_second_per_host"] = tokens / seconds / hosts
    return facts | made


def compile_decode(config: Config, topology: str, outputs: int | None = None) -> dict[str, object]:
    """What the step by which `generate` adds a token needs and does on one chip of a topology, with
    a cache for the whole context: of the deployed form where the model has one. Names as of
    `compile_step`, with 'decode_' before them.

    Raises:
      InputError: as `compile_step`, or the model is no language model. RunError: likewise.
    """
    import jax
    import jax.numpy as jnp

    from quweit_jax.deploy.generate import decode_step, empty_cache
    from quweit_jax.deploy.pack import deployed_shapes
    from quweit_jax.ops.kernels.choice import compiling_for
    from quweit_jax.training.setup import assemble
    from quweit_jax.training.sharding import MeshConfig
    from quweit_jax.training.topologies import devices_of

    devices = devices_of(topology)[:1]
    given = _data(config, outputs)
    one = MeshConfig(data=1)
    whole = assemble(config, data=given, training=False, mesh=one).unscanned()
    if whole.tokenizer is None:
        raise InputError("--decode: a classifier generates no text; leave that out.")
    where = jax.sharding.SingleDeviceSharding(devices[0])

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
        )

    model, token = whole.model, jnp.zeros((1, 1), jnp.int32)
    with compiling_for(devices[0].platform):
        variables = whole.abstract_state().variables()
        deployed = deployed_shapes(model, variables, whole.init_inputs)
        cache = jax.eval_shape(lambda: empty_cache(model))
    arguments = placed((deployed, cache, token, jnp.ones((1, 1), bool)))
    step: Any = decode_step
    made = _compiled(lambda: step.trace(model, *arguments), topology, devices, "decode step")
    held = {"variable_bytes": _bytes(deployed), "cache_bytes": _bytes(cache)}
    facts: dict[str, object] = {**held, "packed": "packed" in deployed, **made}
    return {f"decode_{name}": value for name, value in facts.items()}


def _bytes(tree: Any) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _compiled(
    trace: Callable[[], Any], topology: str, devices: Sequence[Any], what: str
) -> dict[str, object]:
    """Compiles what `trace` traces; what one of the devices needs and does.

    Raises:
      RunError: it has not enough memory.
    """
    import jax

    from quweit_jax.ops.kernels.choice import compiling_for
    from quweit_jax.training import compiled as reading
    from quweit_jax.training.chips import CHIPS
    from quweit_jax.training.topologies import gpu_of

    since, gpu = time.monotonic(), gpu_of(topology)
    with compiling_for(devices[0].platform):
        traced = trace()
        lowered = traced.lower()

    def no_room(needed: str, room: str) -> RunError:
        values = reading.largest(traced.jaxpr)
        named = "; ".join(
            f"{size / len(devices) / 1e9:.2f} GB {kind} of {where}" for size, kind, where in values
        )
        return RunError(
            f"--topology: {topology} has too little memory: the {what} needs {needed} bytes a "
            f"chip, and there are {room}. Its largest values, divided over {len(devices)} chips: "
            f"{named}. Try {_ADVICE}."
        )

    try:
        compiled, text = _with_text(lowered, dumps=gpu is None)
    except jax.errors.JaxRuntimeError as error:
        if not (found := _NO_ROOM.search(str(error))):
            raise
        raise no_room(f"{found[1]} of temporaries", found[2]) from None
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    if gpu is not None and held > gpu.memory:  # XLA compiles for GPUs whatever they hold
        raise no_room(f"{held / 1e9:.2f}G", f"{gpu.memory / 1e9:.2f}G")
    program = reading.read_program(text) if text else reading.Program(0, {})
    operations = reading.flops(traced.jaxpr) / len(devices)
    facts: dict[str, object] = {
        "compile_seconds": round(time.monotonic() - since),
        "argument_bytes_per_chip": memory.argument_size_in_bytes,
        "temporary_bytes_per_chip": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "flops_per_chip": operations,
    }
    if not text:
        facts["collectives_and_estimate"] = "not known: JAX cannot read the compiled program"
    for kind, size in program.collectives.items():
        facts[f"{kind.replace('-', '_')}_bytes_per_chip"] = size
    if kernels := sum(text.count(f'custom_call_target="{name}"') for name in _KERNELS):
        facts["kernels_without_estimate"] = kernels
    chip = CHIPS.get(topology.partition(":")[0])
    if program.cycles and chip is not None and chip.clock:
        seconds = program.cycles / chip.clock
        facts |= {
            "estimated_cycles": program.cycles,
            "estimated_seconds": seconds,
            "share_of_peak": operations / seconds / chip.peak,
        }
    return facts


def _with_text(lowered: Any, *, dumps: bool) -> tuple[Any, str]:
    """A compiled program and its text: JAX's, or where JAX doesn't know all that the compiler
    writes the compiler's own; '' without either.

    dumps: whether the compiler writes its own.
    """
    import jax

    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if dumps else None
        compiled = lowered.compile(compiler_options=options)
        try:
            return compiled, compiled.as_text()
        except jax.errors.JaxRuntimeError:
            written = [path.read_text() for path in Path(folder).rglob("*.after_codegen.txt")]
            return compiled, max(written, key=len, default="")


def _data(config: Config, outputs: int | None) -> Any:
    """A data set of one empty example, shaped as the config's data are known to be."""
    from quweit_jax.costs.count import data_shape
    from quweit_jax.data.pipeline import Dataset
    from quweit_jax.data.tokenizers import ByteTokenizer

    shape = data_shape(config, outputs=outputs)
    if shape.image_size is None:
        text = np.zeros(config.model.context, np.int32)
        example = {"inputs": text, "targets": text}
        return Dataset([example], [example], shape.outputs, "", tokenizer=ByteTokenizer())
    image = (shape.image_size, shape.image_size, shape.channels)
    example = {"inputs": np.zeros(image, np.float32), "targets": np.zeros((), np.int32)}
    return Dataset([example], [example], shape.outputs, "", image_shape=image)
