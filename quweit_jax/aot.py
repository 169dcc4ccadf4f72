"""python -m quweit_jax.aot --config=experiments/vit_cifar.py:paper --topology=v5e:2x4 [--config.a.b=v]"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

from quweit_jax import cli, configs
from quweit_jax.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Compiles a config's whole training step for TPUs that are not there, and tells what a chip would need."""
    rest, overrides = cli.split_overrides(argv)
    parser = cli.parser(
        "aot", "Compiles a config's training step for a TPU topology ahead of time; no TPU is needed, but libtpu is (pip install libtpu)."
    )
    parser.add_argument("--config", required=True, help="FILE.py[:VARIANT,key=value,...]")
    parser.add_argument("--topology", default="v5e:2x4", help="the TPU topology, such as v5e:2x4 or v5p:2x2x4")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(rest)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    config = configs.load_file(args.config)
    for path, text in overrides.items():
        configs.set_value(config, path, text)
    result = compile_step(config, args.topology)
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:>28}: {value:,.0f}" if isinstance(value, int | float) else f"{key:>28}: {value}")
    return 0


def compile_step(config: configs.Config, topology: str) -> dict[str, Any]:
    """Bytes and FLOPs of a chip's part of the compiled training step.

    Raises:
      InputError: libtpu isn't installed, or it knows no such topology.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies

    from quweit_jax.training import run

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise InputError(
            f"--topology: cannot compile for TPU topology '{topology}' ({reason}); pip install libtpu, or give one such as v5e:2x4."
        ) from None
    parts = run.assemble(config, devices=devices)
    state, batch = parts.abstract_state(), parts.abstract_batch()
    step = parts.train_step(jax.tree.map(lambda leaf: leaf.sharding, state))
    since = time.monotonic()
    compiled = step.lower(state, batch).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "topology": topology,
        "chips": len(devices),
        "batch_size": config.batch_size,
        "compile_seconds": round(time.monotonic() - since),
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params)),
        "argument_bytes_per_chip": memory.argument_size_in_bytes,  # type: ignore[union-attr]
        "temporary_bytes_per_chip": memory.temp_size_in_bytes,  # type: ignore[union-attr]
        "code_bytes": memory.generated_code_size_in_bytes,  # type: ignore[union-attr]
        "flops_per_chip": cost.get("flops") if cost else None,
    }


def console() -> None:
    """The installed command."""
    cli.run(main)


if __name__ == "__main__":
    console()
