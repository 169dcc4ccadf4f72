"""python -m quweit_jax.costs --config=experiments/vit_cifar.py:paper,mlp=weightless [--workdir=RUN]
[--json] [--config.a.b=v]
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from quweit_jax import config as configs
from quweit_jax.commands import cli
from quweit_jax.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Counts what one inference of a config or a run costs, beside its dense baseline; reads no
    data and makes no arrays.
    """
    rest, overrides = cli.split_overrides(argv)
    parser = cli.parser(
        "costs",
        "Counts what one image or one token costs: operations, look-ups, bytes and energy, beside "
        "the dense baseline.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="FILE.py[:VARIANT,key=value,...]")
    source.add_argument("--workdir", help="a run directory instead")
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
    parser.add_argument("--layers", action="store_true", help="every layer's row")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="compile the training step too, and tell its memory with and without remat",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.epilog = (
        "--config.PATH=VALUE sets any key of the config, as does key=value behind its colon: "
        "model.weightless.sum=grouped."
    )
    args = parser.parse_args(rest)
    if args.outputs is not None and args.outputs < 1:
        raise InputError(f"--outputs: expected at least 1, found {args.outputs}.")
    from quweit_jax.commands import accounts
    from quweit_jax.costs import table as statement

    config, outputs = (
        (configs.load_file(args.config), args.outputs)
        if args.config
        else accounts.of_run(args.workdir, args.outputs)
    )
    for path, text in overrides.items():
        configs.set_value(config, path, text)
    pairs = [pair.partition("=")[::2] for pair in args.levels.split(",") if pair]
    settings = {
        "lut_model": args.lut_model,
        "levels": dict(pairs),
        "active_bits": args.active_bits,
        "tables_in_place": args.tables_in_place,
    }
    result, counted = statement.account(
        config,
        args.technology.split(","),
        outputs,
        context=args.context,
        precision=args.precision,
        **settings,
    )
    if args.memory:
        result["training_memory"] = accounts.training_memory(config, outputs)
    print(
        json.dumps(result)
        if args.json
        else statement.render(result, args.config or args.workdir, counted if args.layers else None)
    )
    return 0
