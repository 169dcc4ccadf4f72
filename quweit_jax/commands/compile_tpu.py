"""python -m quweit_jax compile_tpu --config=experiments/configs/matmulfree.py:370m"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from quweit_jax.commands import cli
from quweit_jax.config import Config
from quweit_jax.errors import InputError, RunError, first_line

_NO_ROOM = re.compile(r"\(([\d.]+[KMG]?)\) exceeds available HBM \(([\d.]+[KMG]?)\)")
_ADVICE = (
    "--config.model.remat=true, --config.model.scan_layers=true, a smaller --config.batch_size or "
    "larger --config.grad_accum, --config.mesh.data=1 --config.mesh.fsdp=-1, or more chips"
)


def main(argv: Sequence[str]) -> int:
    """Compiles a config's training step for TPUs that are not there, and says what a chip needs."""
    parser = cli.parser(
        "compile_tpu",
        "Compiles a config's training step for a TPU topology ahead of time; no TPU and no data "
        "are needed, but libtpu is (pip install libtpu).",
        "config",
        "json",
    )
    parser.add_argument("--topology", default="v5e:2x4", help="such as v5e:2x4 or v5p:2x2x4")
    parser.add_argument(
        "--outputs", type=int, help="vocabulary or classes, where the data's are not known"
    )
    args, overrides = cli.parse(parser, argv)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    config = cli.load_config(args.config, overrides)
    cli.print_facts(compile_step(config, args.topology, args.outputs), as_json=args.json)
    return 0


def compile_step(config: Config, topology: str, outputs: int | None = None) -> dict[str, object]:
    """What a chip's part of the compiled training step needs and does.

    bytes of arguments and temporaries, bytes received from other chips by kind of collective,
    the operations of matrix products (those that remat repeats among them), and the compiler's
    estimate of a step's time, from cycles in which nothing waits for memory or other chips;
    without our own kernels, of which it has none (benchmarks/tpu_kernels.py says what they take).

    Raises:
      InputError: libtpu isn't installed, or knows no such topology, or the data's vocabulary is
        not known. RunError: a chip has not enough memory.
    """
    import jax

    from quweit_jax.ops.kernels.choice import compiling_for
    from quweit_jax.training import compiled as reading
    from quweit_jax.training.chips import CHIPS
    from quweit_jax.training.setup import assemble

    devices = _devices(topology)
    setup = assemble(config, data=_data(config, outputs), devices=devices)
    state, since = setup.abstract_state(), time.monotonic()
    step: Any = setup.train_step(state)
    with compiling_for("tpu", portable=True):
        traced = step.trace(state, setup.abstract_batch())
        lowered = traced.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not (found := _NO_ROOM.search(str(error))):
            raise
        values = reading.largest(traced.jaxpr)
        named = "; ".join(
            f"{size / len(devices) / 1e9:.2f} GB {what} of {where}" for size, what, where in values
        )
        raise RunError(
            f"--topology: {topology} has too little memory: the step needs {found[1]} bytes of "
            f"temporaries a chip, and there are {found[2]}. Its largest values, divided over "
            f"{len(devices)} chips: {named}. Try {_ADVICE}."
        ) from None
    text, memory = compiled.as_text(), compiled.memory_analysis()
    program = reading.read_program(text)
    operations = reading.flops(traced.jaxpr) / len(devices)
    chip = CHIPS.get(topology.partition(":")[0])
    facts: dict[str, object] = {
        "topology": topology,
        "chips": len(devices),
        "batch_size": config.batch_size,
        "outputs": setup.data.outputs,
        "compile_seconds": round(time.monotonic() - since),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "argument_bytes_per_chip": memory.argument_size_in_bytes,
        "temporary_bytes_per_chip": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "flops_per_chip": operations,
    }
    for kind, size in program.collectives.items():
        facts[f"{kind.replace('-', '_')}_bytes_per_chip"] = size
    if kernels := text.count('custom_call_target="tpu_custom_call"'):
        facts["kernels_without_estimate"] = kernels
    if program.cycles and chip is not None and chip.clock:
        seconds = program.cycles / chip.clock
        facts |= {
            "estimated_cycles": program.cycles,
            "estimated_seconds": seconds,
            "share_of_peak": operations / seconds / chip.peak,
        }
    return facts


def _devices(topology: str) -> Sequence[Any]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        raise InputError(
            f"--topology: cannot compile for TPU topology '{topology}' ({first_line(error)}); "
            "pip install libtpu, or give one such as v5e:2x4."
        ) from None


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
