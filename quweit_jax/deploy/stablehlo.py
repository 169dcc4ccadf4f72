"""A trained model as one StableHLO file, weights inside, that plain JAX runs on CPU, TPU and GPU
without this project:

    import jax.export, numpy as np
    with open("model.stablehlo", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    print(program.in_avals, "->", program.out_avals)
    logits = program.call(np.zeros((3, 16), np.int32))  # 3 texts of 16 tokens

What went in and what comes out, the tokenizer or the images' normalization, and the config are in
`model.json` beside it. It needs the packages jax and flatbuffers, a jax of the version it was
written with or up to about half a year newer (JAX's promise for such files).

Dimensions: b batch, t tokens; both are free until the program is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree
from numpy.typing import DTypeLike

from quweit_jax.data.images import NORMALIZATIONS
from quweit_jax.data.pipeline import Dataset
from quweit_jax.data.tokenizers import Tokenizer
from quweit_jax.errors import InputError, nearest, require
from quweit_jax.ops.counts import stored_bytes
from quweit_jax.ops.kernels.choice import compiling_for
from quweit_jax.reading import check_local, shown, why

Tree: TypeAlias = dict[str, PyTree]  # variables, or a state
Json: TypeAlias = dict[str, Any]
Apply: TypeAlias = Callable[..., PyTree]  # (variables, input, ...) -> outputs
PLATFORMS = ("cpu", "tpu", "cuda", "rocm")
DEFAULT_PLATFORMS = PLATFORMS[:3]
# A serialized program is one flatbuffer, below 2 GiB; something is left for the program itself.
MAX_WEIGHT_BYTES = 2**31 - 2**26
_LOAD = """import jax.export, numpy as np
with open("{file}", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
print(program.in_avals, "->", program.out_avals)
{call}"""


@dataclasses.dataclass(frozen=True)
class Input:
    """An array that a program takes.

    shape: numbers, or 'b' or 't' for dimensions that are free within `limits`.
    example_t: a t to show.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    meaning: str
    limits: tuple[str, ...] = ("b >= 1",)
    example_t: int = 1


def _abstract(
    shape: Sequence[int | str], dtype: str, scope: jax.export.SymbolicScope
) -> jax.ShapeDtypeStruct:
    dimensions = jax.export.symbolic_shape(",".join(map(str, shape)), scope=scope)
    return jax.ShapeDtypeStruct(dimensions, np.dtype(dtype))


def tokens_input(vocab_size: int, context: int | None, *, one_step: bool = False) -> Input:
    """Texts (b, t) of at most `context` tokens (None: of any length), or one decoding step's
    tokens (b, 1).
    """
    meaning = f"ids of tokens, 0 to {vocab_size - 1}"
    if one_step:
        return Input("tokens", ("b", 1), "int32", meaning)
    limits = ("b >= 1", "t >= 1") + ((f"t <= {context}",) if context is not None else ())
    return Input("tokens", ("b", "t"), "int32", meaning, limits, min(16, context or 16))


def examples_input(shape: Sequence[int]) -> Input:
    """Images (b, H, W, C), or other inputs of one size: (b, *shape)."""
    name = "images" if len(shape) == 3 else "inputs"
    meaning = "images (batch, height, width, channels), normalized"
    return Input(name, ("b", *shape), "float32", meaning)


def portable(model: nn.Module) -> nn.Module:
    """The same model without what only one platform has (cuDNN's attention)."""
    config = getattr(model, "config", None)
    if getattr(config, "attention", "xla") == "xla":
        return model
    return model.clone(config=dataclasses.replace(config, attention="xla"))  # type: ignore[arg-type]


def to_program(
    apply: Apply, variables: Tree, given: Input, platforms: Sequence[str] = DEFAULT_PLATFORMS
) -> jax.export.Exported:
    """`x -> apply(variables, x)` with the variables inside.

    Raises:
      InputError: an unknown platform, or variables too large for one file.
    """
    check(variables, platforms)
    function = jax.jit(lambda x: apply(_inside(variables), x))
    abstract = _abstract(given.shape, given.dtype, jax.export.SymbolicScope(given.limits))
    with _traced_for(platforms):
        return jax.export.export(function, platforms=tuple(platforms))(abstract)


def to_step_program(
    model: nn.Module, variables: Tree, platforms: Sequence[str] = DEFAULT_PLATFORMS
) -> jax.export.Exported:
    """One step of decoding: (tokens (b, 1) int32, state) -> (logits (b, V), the next state).

    The state is a tree of arrays, see `state_shapes`; the first is all zeros.

    Raises:
      InputError: see `to_program`.
    """
    check(variables, platforms)

    def step(tokens: Array, state: Tree) -> tuple[Array, Tree]:
        known = {**_inside(variables), "cache": state}
        out: Any = model.apply(known, tokens, decode=True, mutable=["cache"])
        logits, changed = out
        return logits[:, -1], changed["cache"]

    scope = jax.export.SymbolicScope(("b >= 1",))
    state = jax.tree.map(
        lambda s: _abstract(s["shape"], s["dtype"], scope), state_shapes(model), is_leaf=_is_shape
    )
    with _traced_for(platforms):
        return jax.export.export(jax.jit(step), platforms=tuple(platforms))(
            _abstract(("b", 1), "int32", scope), state
        )


def _traced_for(platforms: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """What is chosen by platform while a program is traced works on all of its platforms, in other
    processes: on several that is what a CPU can do without native code.
    """
    one = {"cuda": "gpu", "rocm": "gpu"}.get(platforms[0], platforms[0])
    return compiling_for(one if len(platforms) == 1 else "cpu", portable=True)


def _inside(variables: Tree) -> Tree:
    """The variables as the program holds them: in their own types, each behind a barrier.

    Without it the compiler would compute what depends on weights alone (wiring from scores, say)
    itself, at each compilation and very slowly: 18 s for the largest of 2,048 x 256 numbers, and
    0.1 s for the whole program with the barrier (XLA on a CPU).
    """
    return jax.tree.map(jax.lax.optimization_barrier, variables)


def state_shapes(model: nn.Module) -> Tree:
    """What a language model carries from token to token: {'shape': ['b', ...], 'dtype': ...} for
    each array.
    """

    def cache(batch: int) -> Tree:
        tokens = jnp.zeros((batch, 1), jnp.int32)
        return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, decode=True))["cache"]

    def described(two: jax.ShapeDtypeStruct, three: jax.ShapeDtypeStruct) -> Json:
        # The batch is where caches for two and for three texts differ.
        return _shown(("b" if m != n else m for m, n in zip(two.shape, three.shape)), two.dtype)

    return jax.tree.map(described, cache(2), cache(3))


def _is_shape(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"shape", "dtype"}


def check(variables: Tree, platforms: Sequence[str]) -> None:
    """Raises InputError for an unknown platform, or for variables too large for one file."""
    if not platforms:
        raise InputError(f"platforms: expected one or more of {', '.join(PLATFORMS)}, found none.")
    for name in platforms:
        if name not in PLATFORMS:
            hint = nearest(name, PLATFORMS)
            if name == "gpu":
                hint = " JAX calls NVIDIA GPUs cuda, and AMD's rocm."
            raise InputError(
                f"platforms: expected some of {', '.join(PLATFORMS)}, found '{name}'.{hint}"
            )
    if (size := stored_bytes(variables)) > MAX_WEIGHT_BYTES:
        raise InputError(
            f"export: the weights are {size:,} bytes, and a StableHLO file with weights inside "
            f"holds at most {MAX_WEIGHT_BYTES:,}; export the packed form (--packed) if that is "
            "smaller, or write the weights as safetensors (pretrained.save)."
        )


def check_target(out: Path, overwrite: bool = False) -> None:
    """Raises InputError unless a program and its description can be written to `out` safely."""
    check_local(out, "--out", "write it here, and copy it")
    if out.suffix == ".json" or not out.name or os.path.isdir(out):
        raise InputError(
            "--out: expected a file such as model.stablehlo (its description becomes model.json), "
            f"found {out}."
        )
    if not os.path.isdir(out.absolute().parent):
        raise InputError(f"--out: no folder {out.absolute().parent}; make it first.")
    for path in (out, out.with_suffix(".json")):
        try:
            _temporary(path).exists()  # its name may be too long
        except OSError as error:
            raise _cannot_write(path, error) from None
        if os.path.lexists(path) and not overwrite:
            raise InputError(f"--out: {path} exists; give another name, or --overwrite.")


def save(
    program: jax.export.Exported, out: Path, about: Json, given: Input, *, overwrite: bool = False
) -> Json:
    """Writes the program to `out` and its description, which is returned, beside it as .json.

    about: what the description says besides inputs, outputs and platforms. given: the first input.

    Raises:
      InputError: there is something at `out` already, or nothing can be written there.
    """
    check_target(out, overwrite)
    require("flatbuffers", "to serialize a program")
    data = bytes(program.serialize())
    sums = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    description = describe(program, given, out.name) | sums | dict(about)
    text = json.dumps(description, indent=2, ensure_ascii=False)
    for path, content in ((out, data), (out.with_suffix(".json"), text.encode())):
        try:
            # What is there already may be a pipe, or a link to another file.
            _temporary(path).unlink(missing_ok=True)
            _temporary(path).write_bytes(content)
            _temporary(path).replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                _temporary(path).unlink(missing_ok=True)
            raise _cannot_write(path, error) from None
    return description


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")  # a file is whole or not there


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(
        f"--out: cannot write {shown(path)} ({why(error)}); give another name, or a folder you can "
        "write to."
    )


def describe(program: jax.export.Exported, given: Input, file: str = "model.stablehlo") -> Json:
    """What somebody who only has the file needs to call it; a step's `state` is zeros at first."""
    taken, given_back = (
        [_shown(a.shape, a.dtype) for a in avals] for avals in (program.in_avals, program.out_avals)
    )
    arguments, _ = jax.tree.unflatten(program.in_tree, taken)
    results = jax.tree.unflatten(program.out_tree, given_back)
    free: dict[int | str, int] = {"b": 3, "t": given.example_t}
    example = f"np.zeros({tuple(free.get(d, d) for d in given.shape)}, np.{given.dtype})"
    call = f"logits = program.call({example})"
    state = arguments[1] if len(arguments) > 1 else None
    if state is not None:
        call = (
            f'import json\nstate = json.load(open("{Path(file).with_suffix(".json")}"))["state"]\n'
            'zeros = lambda s: np.zeros([3 if n == "b" else n for n in s["shape"]], s["dtype"])\n'
            'state = jax.tree.map(zeros, state, is_leaf=lambda s: "dtype" in s)\n'
            f"logits, state = program.call({example}, state)  # and again with the next tokens"
        )
    logits = results if state is None else results[0]
    described = {"name": given.name, "meaning": given.meaning, **arguments[0]}
    return {
        "inputs": [described | {"limits": list(given.limits)}],
        "outputs": [{"name": "logits", **logits}],
        **({"state": state} if state is not None else {}),
        "platforms": list(program.platforms),
        "calling_convention_version": program.calling_convention_version,
        "load": _LOAD.format(file=file, call=call).splitlines(),
    }


def about_data(tokenizer: Tokenizer | None, normalize: str, dataset: Dataset | None) -> Json:
    """What makes inputs and reads outputs: the tokenizer, or the classes and normalization."""
    if tokenizer is not None:
        return {"tokenizer": tokenizer.to_json()}
    assert dataset is not None
    about: Json = {"labels": list(dataset.labels)}
    if dataset.image_shape is not None:
        mean, deviation = NORMALIZATIONS[normalize]
        formula = "(pixel / 255 - mean) / deviation"
        about["pixels"] = {"formula": formula, "mean": mean, "deviation": deviation}
    return about


def _shown(shape: Iterable[object], dtype: DTypeLike) -> Json:
    dimensions = [n if isinstance(n, int) else str(n) for n in shape]
    return {"shape": dimensions, "dtype": np.dtype(dtype).name}
