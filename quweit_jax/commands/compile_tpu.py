"""python -m quweit_jax compile_tpu --config=experiments/configs/vit_cifar.py:paper --topology=v5e:2x4"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from quweit_jax.commands import cli
from quweit_jax.config import Config
from quweit_jax.errors import InputError, first_line


def main(argv: Sequence[str]) -> int:
    """Compiles a config's training step for TPUs that are not there, and says what a chip needs."""
    parser = cli.parser(
        "compile_tpu",
        "Compiles a config's training step for a TPU topology ahead of time; no TPU is needed, "
        "but libtpu is (pip install libtpu).",
        "config",
        "json",
    )
    parser.add_argument("--topology", default="v5e:2x4", help="such as v5e:2x4 or v5p:2x2x4")
    args, overrides = cli.parse(parser, argv)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    config = cli.load_config(args.config, overrides)
    cli.print_facts(compile_step(config, args.topology), as_json=args.json)
    return 0


def compile_step(config: Config, topology: str) -> dict[str, object]:
    """Bytes and FLOPs of a chip's part of the compiled training step.

    Raises:
      InputError: libtpu isn't installed, or it knows no such topology.
    """
    import jax
    from jax.experimental import topologies

    from quweit_jax.ops.kernels.choice import compiling_for
    from quweit_jax.training.setup import assemble

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        raise InputError(
            f"--topology: cannot compile for TPU topology '{topology}' ({first_line(error)}); pip install "
            "libtpu, or give one such as v5e:2x4."
        ) from None
    setup = assemble(config, devices=devices)
    with compiling_for("tpu", portable=True):
        state, since = setup.abstract_state(), time.monotonic()
        lowered = setup.train_step(state).lower(state, setup.abstract_batch())  # type: ignore[attr-defined]
    compiled = lowered.compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "topology": topology,
        "chips": len(devices),
        "batch_size": config.batch_size,
        "compile_seconds": round(time.monotonic() - since),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "argument_bytes_per_chip": memory.argument_size_in_bytes,
        "temporary_bytes_per_chip": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "flops_per_chip": cost.get("flops") if cost else None,
    }
