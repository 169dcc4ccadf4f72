"""The kernels for GPUs beside XLA's forms and the limit of the memory, on a GPU:
python benchmarks/gpu_kernels.py --out=FILE.txt

Where torch and torch_dwn are installed their look-ups (forward and backward) are timed in the same
run, in turn with ours. --compile: no GPU is needed; each kernel is compiled for an H100, and the
registers and the bytes that it spills are printed, for which JAX's plugin for CUDA and ptxas are
enough (docs/howto/kernels.md). --small: small shapes, to see that all can be compiled.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timing

_SPILLED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_OURS = re.compile(r"\.entry (lut|recurrence|ternary|packed)_")


class Piece(NamedTuple):
    """What is compared: the function with an implementation ('pallas' is ours), what makes its
    arguments, and the bytes that have to go through memory; torch: a rival, where there is one.
    """

    run: Callable[[str], Callable[..., Any]]
    make: Callable[[], tuple[Any, ...]]
    moved: float
    xla: str = "xla"
    torch: Callable[[], Callable[[], None]] | None = None


def look_ups(tokens: int, inputs: int, luts: int, n: int) -> dict[str, Piece]:
    """Look-ups of real tables, feature-major."""
    import jax

    from quweit_jax.ops import lut
    from quweit_jax.ops.wiring import invert_wiring, random_wiring

    def make() -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), 4)
        bits = jax.random.bernoulli(keys[0], 0.5, (inputs, tokens)).astype("float32")
        wiring = random_wiring(keys[1], inputs, luts, n)
        inverse = invert_wiring(wiring, inputs)
        tables = jax.random.uniform(keys[2], (luts, 2**n), minval=-1.0)
        return bits, wiring, inverse, tables, jax.random.normal(keys[3], (luts, tokens))

    def read(implementation: str) -> Callable[..., Any]:
        def forward(bits: Any, wiring: Any, inverse: Any, tables: Any, grad: Any) -> Any:
            return lut.lut_lookup_feature_major(
                bits, wiring, tables, inverse=inverse, implementation=implementation
            )

        return forward

    def both(implementation: str) -> Callable[..., Any]:
        def run(bits: Any, wiring: Any, inverse: Any, tables: Any, grad: Any) -> Any:
            out, pullback = jax.vjp(
                lambda b, t: read(implementation)(b, wiring, inverse, t, grad), bits, tables
            )
            return out, pullback(grad)

        return run

    values, features = 4 * luts * tokens, 4 * inputs * tokens
    return {
        "look-up forward": Piece(read, make, features + values),
        "look-up forward + backward": Piece(
            both, make, 2 * (features + values), torch=lambda: rival(tokens, inputs, luts, n)
        ),
    }


def rival(tokens: int, inputs: int, luts: int, n: int) -> Callable[[], None]:
    """torch_dwn's look-ups of the same size, forward and backward."""
    import torch  # type: ignore[import-not-found]
    import torch_dwn  # type: ignore[import-not-found]

    layer = torch_dwn.LUTLayer(inputs, luts, n=n, mapping="random").cuda()
    bits = torch.randint(0, 2, (tokens, inputs), device="cuda").float().requires_grad_()
    grad = torch.randn(tokens, luts, device="cuda")

    def run() -> None:
        layer(bits).backward(grad)
        torch.cuda.synchronize()

    return run


def recurrences(batch: int, steps: int, features: int) -> dict[str, Piece]:
    """The gated recurrence."""
    import jax

    from quweit_jax.ops.recurrence import gated_recurrence

    def make() -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (batch, steps, features)
        gates = jax.random.uniform(keys[0], shape)
        return gates, *(jax.random.normal(key, shape) for key in keys[1:])

    def states(implementation: str) -> Callable[..., Any]:
        return lambda f, c, g: gated_recurrence(f, c, implementation=implementation)[0]

    def both(implementation: str) -> Callable[..., Any]:
        def run(f: Any, c: Any, g: Any) -> Any:
            out, pullback = jax.vjp(lambda f, c: states(implementation)(f, c, g), f, c)
            return out, pullback(g)

        return run

    once = 4 * batch * steps * features
    return {
        "recurrence forward": Piece(states, make, 3 * once, "chunked"),
        "recurrence forward + backward": Piece(both, make, 8 * once, "chunked"),
    }


def ternaries(tokens: int, inputs: int, outputs: int) -> dict[str, Piece]:
    """The packed ternary product."""
    import jax

    from quweit_jax.ops.packed_ternary import pack_ternary, packed_bytes, packed_sums

    def make() -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.randint(keys[0], (tokens, inputs), -128, 128, "int8")
        weights = jax.random.randint(keys[1], (inputs, outputs), -1, 2, "int8")
        return x, jax.jit(pack_ternary)(weights)

    def sums(implementation: str) -> Callable[..., Any]:
        return lambda x, packed: packed_sums(x, packed, implementation=implementation)

    moved = packed_bytes(inputs, outputs) + tokens * (inputs + 4 * outputs)
    return {f"ternary {inputs} x {outputs}, tokens: {tokens}": Piece(sums, make, moved)}


def packed_look_ups(tokens: int, inputs: int, luts: int, n: int) -> dict[str, Piece]:
    """Look-ups of packed bits in 1-bit tables."""
    import jax

    from quweit_jax.ops import packed_lut
    from quweit_jax.ops.wiring import random_wiring

    words = -(-tokens // packed_lut.WORD)

    def make() -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), 3)
        tables = jax.random.normal(keys[2], (luts, 2**n))
        return (
            jax.random.bits(keys[0], (inputs, words)),
            random_wiring(keys[1], inputs, luts, n),
            packed_lut.pack_tables(tables),
        )

    def read(implementation: str) -> Callable[..., Any]:
        return lambda words, wiring, tables: (
            packed_lut.look_up_words(
                packed_lut.Bits(words, tokens), wiring, tables, implementation=implementation
            ).words
        )

    return {"packed look-up": Piece(read, make, 4 * words * (inputs + luts))}


def pieces(small: bool) -> dict[str, dict[str, Piece]]:
    """What is compared, under the sizes at which it is."""
    if small:
        return {
            "small": look_ups(70, 16, 40, 6)
            | packed_look_ups(70, 16, 40, 6)
            | recurrences(1, 130, 40)
            | ternaries(3, 256, 300)
        }
    return {
        "4,096 tokens, F = L = 1,536, n = 6": look_ups(4096, 1536, 1536, 6)
        | packed_look_ups(4096, 1536, 1536, 6),
        "2,048 tokens, F = 1,536, L = 2,688, n = 4": look_ups(2048, 1536, 2688, 4),
        "1,024 tokens, F = L = 1,024, n = 8": look_ups(1024, 1024, 1024, 8)
        | packed_look_ups(1024, 1024, 1024, 8),
        "(8, 2048, 2048)": recurrences(8, 2048, 2048),
        "(1, 2048, 1024)": recurrences(1, 2048, 1024),
        "decoding": ternaries(1, 4096, 4096) | ternaries(8, 4096, 4096) | ternaries(1, 5120, 13824),
    }


def ptxas() -> str | None:
    """The assembler of CUDA, which says what a kernel needs: on the path, or from its wheel."""
    wheels = [
        path
        for folder in sys.path
        for path in map(str, Path(folder or ".").glob("nvidia/*/bin/ptxas"))
    ]
    return next(iter([*filter(None, [shutil.which("ptxas")]), *wheels]), None)


def assembled(file: Path, assembler: str) -> dict[str, dict[str, int]]:
    """Of the kernels of ours in a file of PTX: registers of a thread, and the bytes of its stack
    frame and of its spills.
    """
    if not _OURS.search(file.read_text()):
        return {}
    run = [assembler, "-v", "-arch=sm_90a", str(file), "-o", str(file.with_suffix(".cubin"))]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stderr
    found: dict[str, dict[str, int]] = {}
    for part in said.split("Compiling entry function")[1:]:
        name = _ENTRY.search("Compiling entry function" + part)
        spilled, registers = _SPILLED.search(part), re.search(r"Used (\d+) registers", part)
        if name and spilled and registers:
            stack, stores, loads = map(int, spilled.groups())
            found[name[1]] = {
                "registers": int(registers[1]),
                "stack_bytes": stack,
                "spilled_bytes": stores + loads,
            }
    return found


def compile_all(args: Any) -> None:
    """Compiles every kernel for an H100 that is not there, and says what each needs."""
    folder = Path(tempfile.mkdtemp(prefix="gpu_kernels_"))
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} {os.environ.get('XLA_FLAGS', '')}"
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu"}
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is read from it leaves no PTX
    assembler = ptxas()
    if assembler is None:
        sys.exit("--compile needs ptxas, of CUDA or of the wheel nvidia-cuda-nvcc.")

    import jax

    from quweit_jax.ops.kernels.choice import compiling_for, divided
    from quweit_jax.training.topologies import devices_of

    device = devices_of("h100:1")[0]
    where, mesh = jax.sharding.SingleDeviceSharding(device), jax.sharding.Mesh([device], ("data",))
    lines = [
        "h100, sm_90a: what ptxas says of our kernels; none was run",
        timing.machine(("jax", "jaxlib", "jax-cuda13-plugin")),
        f"{'':26}registers  stack bytes  spilled bytes",
    ]
    print("\n".join(lines), flush=True)
    results: dict[str, Any] = {}
    for title, group in pieces(args.small).items():
        for name, piece in group.items():
            shapes = jax.tree.map(
                lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
                jax.eval_shape(piece.make),
            )
            with compiling_for("gpu"), divided(mesh, "data"):
                jax.jit(piece.run("pallas")).lower(*shapes).compile()
            found: dict[str, dict[str, int]] = {}
            for file in sorted(folder.glob("*.ptx")):
                found |= assembled(file, assembler)
            for file in folder.iterdir():
                file.unlink()
            results[f"{title}: {name}"] = found
            new = [f"{title}: {name}"] + [
                f"  {kernel:24}{of['registers']:9}  {of['stack_bytes']:11}  "
                f"{of['spilled_bytes']:13}"
                for kernel, of in found.items()
            ]
            lines += new
            print("\n".join(new), flush=True)
    folder.rmdir()
    timing.write(args.out, lines)
    timing.write_json(args.out, {"versions": lines[1], "found": results})


def finished(compiled: Any, arguments: tuple[Any, ...]) -> None:
    """Runs a program to its end."""
    import jax

    jax.block_until_ready(compiled(*arguments))


def measure_all(args: Any) -> None:
    """Times every kernel beside XLA's form."""
    import jax

    from quweit_jax.training import topologies

    if jax.default_backend() != "gpu":
        sys.exit(
            f"gpu_kernels.py times kernels on a GPU, and JAX has a {jax.default_backend()} here; "
            "--compile says what the kernels need without one."
        )
    kind = jax.devices()[0].device_kind
    gpu = next((of for of in topologies.GPUS.values() if of.name == kind), None)
    rivals = all(map(importlib.util.find_spec, ("torch", "torch_dwn")))
    lines = [
        f"{kind}; the memory's limit is "
        + (f"bytes at {gpu.bandwidth / 1e9:.0f} GB/s" if gpu else "not known for it"),
        timing.machine(("jax", "jaxlib")),
        f"{'':40}  ours us  memory us   XLA us  times faster  torch_dwn us",
    ]
    print("\n".join(lines), flush=True)
    results: dict[str, Any] = {}
    for title, group in pieces(args.small).items():
        lines.append(title)
        print(title, flush=True)
        for name, piece in group.items():
            arguments = piece.make()
            calls: dict[str, Callable[[], object]] = {}
            for label, implementation in (("ours", "pallas"), ("xla", piece.xla)):
                compiled = jax.jit(piece.run(implementation)).lower(*arguments).compile()
                calls[label] = functools.partial(finished, compiled, arguments)
            if piece.torch and rivals:
                calls["torch"] = piece.torch()
            us = {k: 1e6 * s for k, s in timing.side_by_side(calls, args.rounds).items()}
            limit = 1e6 * piece.moved / gpu.bandwidth if gpu else float("nan")
            results[f"{title}: {name}"] = {"us": us, "memory_us": limit, "bytes": piece.moved}
            lines.append(
                f"  {name:38}  {us['ours']:7.1f}  {limit:9.1f}  {us['xla']:7.1f}  "
                f"{us['xla'] / us['ours']:12.1f}  {us.get('torch', float('nan')):12.1f}"
            )
            print(lines[-1], flush=True)
            timing.write(args.out, lines)
            timing.write_json(args.out, {"device": kind, "versions": lines[1], "found": results})


def main() -> None:
    parser = timing.parser(__doc__, rounds=50)
    parser.add_argument("--compile", action="store_true", help="for a GPU that is not there")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    compile_all(args) if args.compile else measure_all(args)


if __name__ == "__main__":
    main()
