"""python -m quweit_jax.aot --config=experiments/vit_cifar.py:paper --topology=v5e:2x4
[--config.a.b=v]
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from quweit_jax import config as configs
from quweit_jax.commands import cli


def main(argv: Sequence[str]) -> int:
    """Compiles a config's whole training step for TPUs that are not there, and tells what a chip
    would need.
    """
    rest, overrides = cli.split_overrides(argv)
    parser = cli.parser(
        "compile_tpu",
        "Compiles a config's training step for a TPU topology ahead of time; no TPU is needed, "
        "but libtpu is (pip install libtpu).",
    )
    parser.add_argument("--config", required=True, help="FILE.py[:VARIANT,key=value,...]")
    parser.add_argument(
        "--topology", default="v5e:2x4", help="the TPU topology, such as v5e:2x4 or v5p:2x2x4"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(rest)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    config = configs.load_file(args.config)
    for path, text in overrides.items():
        configs.set_value(config, path, text)
    from quweit_jax.commands import ahead_of_time

    cli.print_facts(ahead_of_time.compile_step(config, args.topology), as_json=args.json)
    return 0
