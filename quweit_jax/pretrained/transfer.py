"""Fine-tuning from other variables: what fits is taken, and what was and wasn't is told."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import PyTree

from quweit_jax.errors import InputError
from quweit_jax.models.parts import PARTS
from quweit_jax.ops.patches import resample_positions
from quweit_jax.pretrained import deit, saved
from quweit_jax.pretrained.kinds import KINDS, kind_of

COLLECTIONS = ("params", "wiring", "ranges")  # caches and packed forms are not carried over
_Path = tuple[str, ...]  # collection, modules, name


@dataclasses.dataclass(frozen=True)
class Report:
    """What `merge` did, by arrays' names: 'block_0/mlp/up/kernel', wiring likewise,
    'ranges/block_0/quant_mlp/max'.

    taken: as they are in the source. resampled: to another grid. fresh: the target's own. unused:
    the source's, without a place.
    """

    taken: tuple[str, ...]
    resampled: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def describe(self) -> str:
        """'init_from: 146 of 152 arrays taken; fresh: head, block_*/mlp; unused: block_*/mlp'."""
        used = self.taken + self.resampled
        parts = [f"init_from: {len(used)} of {len(used) + len(self.fresh)} arrays taken"]
        if self.resampled:
            parts.append(f"resampled: {', '.join(self.resampled)}")
        for what, names in (("fresh", self.fresh), ("unused", self.unused)):
            if names:
                parts.append(f"{what}: {', '.join(_summary(names, used))}")
        return "; ".join(parts)


def read_source(path: str | Path) -> dict[str, PyTree]:
    """The variables of a published checkpoint to start from, of any kind that `pretrained.load`
    reads, or of a folder that the command `pack` wrote; which one is told from what is there.

    Args:
      path: a file (*.safetensors, *.pth, *.pt, *.bin) or a folder that holds one; of a vision model
        config.json may be missing.

    Returns:
      {'params': ...}, of I-ViT also 'ranges', of a packed folder all that it has.

    Raises:
      InputError: as `pretrained.load`; or the folder has the packed form, which is not trained.
    """
    path = Path(path).expanduser()
    if saved.is_saved(path):
        variables = saved.load_model(path).variables
        if "packed" in variables:
            raise InputError(
                f"{path} has the packed form alone, from which nothing is trained; give the run, "
                "or write it with pack --trained."
            )
        return variables
    kind = kind_of(path)
    if kind in ("deit", "ivit"):
        return deit.read_variables(path)  # which need not know the number of heads
    return KINDS[kind](path).read()


def merge(
    target: Mapping[str, PyTree], source: Mapping[str, PyTree]
) -> tuple[dict[str, PyTree], Report]:
    """Puts into `target` what of `source` has the same path and shape; the rest stays the target's,
    freshly initialized.

    A ViT's positional embedding of another square grid is resampled. Look-up tables mean nothing
    without their wiring, nor a weightless block's vectors without its tables: these are taken
    together or not at all. The norm before a channel mixer is the same whether the model has it or
    the mixer brings it; queries, keys and values are the same in one matrix or in three, and so are
    a gated unit's two branches.

    Args:
      target: the variables of the model to train, {'params': ..., 'wiring': ..., 'ranges': ...} or
        fewer, and collections of other names, which stay. source: variables of another model.

    Returns:
      (merged, report): new variables of the target's paths, shapes and dtypes; neither argument is
      changed.

    Raises:
      InputError: next to nothing fits.
    """
    ours = _flatten(target)
    theirs = _with_parts_in_place(_with_norms_in_place(_flatten(source), ours), ours)
    fits = {
        path for path, value in ours.items() if path in theirs and _same_kind(value, theirs[path])
    }
    for members in _together(ours):
        if not members <= fits:
            fits -= members
    merged, resampled = {path: jnp.asarray(theirs[path], ours[path].dtype) for path in fits}, []
    for path in sorted(ours.keys() - fits):
        if (
            path[-1] == "position_embedding"
            and path in theirs
            and (value := _resample(path, ours, theirs)) is not None
        ):
            merged[path] = value
            resampled.append(path)
    # Biases of as many numbers as there are classes fit by chance; matrices and tables do not.
    if not any(path[0] == "params" and np.ndim(value) > 1 for path, value in merged.items()):
        raise InputError(
            f"init_from: none of the source's {len(theirs)} arrays fits the model's {len(ours)} "
            f"({_differing(theirs, ours)}); use the same width, depth and heads, of a ViT "
            "--config.model.variant."
        )
    report = Report(
        taken=_names(fits),
        resampled=_names(resampled),
        fresh=_names(ours.keys() - merged.keys()),
        unused=_names(theirs.keys() - merged.keys()),
    )
    rest = {name: collection for name, collection in target.items() if name not in COLLECTIONS}
    empty = {name: {} for name in target if name in COLLECTIONS}
    return {**rest, **empty, **unflatten_dict(ours | merged)}, report


def _flatten(variables: Mapping[str, PyTree]) -> dict[_Path, Array | np.ndarray]:
    return {  # type: ignore[return-value]
        (name, *path): value
        for name in COLLECTIONS
        if name in variables
        for path, value in flatten_dict(variables[name]).items()
    }


def _with_norms_in_place(
    theirs: dict[_Path, Array | np.ndarray], ours: Mapping[_Path, Array | np.ndarray]
) -> dict[_Path, Array | np.ndarray]:
    """The source's arrays, those of the norms before channel mixers by the target's names:
    'block_0/mlp_norm' of a mixer that reads what is normalized, 'block_0/mlp/norm' of one that
    normalizes itself.
    """

    def place(path: _Path) -> _Path:
        text = "/".join(path)
        for old, new in (("/mlp_norm/", "/mlp/norm/"), ("/mlp/norm/", "/mlp_norm/")):
            other = tuple(text.replace(old, new).split("/"))
            if path not in ours and other in ours and other not in theirs:
                return other
        return path

    return {place(path): value for path, value in theirs.items()}


def _with_parts_in_place(
    theirs: dict[_Path, Array | np.ndarray], ours: Mapping[_Path, Array | np.ndarray]
) -> dict[_Path, Array | np.ndarray]:
    """The source's arrays, projections cut into parts, or put together, as the target has them;
    those whose widths do not add up stay as they are.
    """
    placed = dict(theirs)
    for path in ours.keys() | theirs.keys():
        if len(path) < 3 or (names := PARTS.get(path[-2])) is None:
            continue
        parts = [(*path[:-2], name, path[-1]) for name in names]
        if _in_one(theirs, path, parts) and ours.keys() >= set(parts):
            widths = [np.shape(ours[part])[-1] for part in parts]
            if np.shape(theirs[path])[-1] == sum(widths):
                cuts = np.cumsum(widths)[:-1]
                pieces = np.split(np.asarray(placed.pop(path)), cuts, -1)
                placed |= dict(zip(parts, pieces))
        elif _in_one(ours, path, parts) and theirs.keys() >= set(parts):
            pieces = [np.asarray(theirs[part]) for part in parts]
            if np.shape(ours[path])[-1] == sum(piece.shape[-1] for piece in pieces):
                for part in parts:
                    del placed[part]
                placed[path] = np.concatenate(pieces, -1)
    return placed


def _in_one(arrays: Mapping[_Path, object], path: _Path, parts: Iterable[_Path]) -> bool:
    """Whether the whole projection is there, and none of its parts (one may have its name)."""
    return path in arrays and not any(part in arrays for part in parts if part != path)


def _same_kind(ours: Array | np.ndarray, theirs: Array | np.ndarray) -> bool:
    """Same shape, and both real numbers or both whole ones."""
    kinds = [jnp.issubdtype(value.dtype, jnp.floating) for value in (ours, theirs)]
    return np.shape(ours) == np.shape(theirs) and kinds[0] == kinds[1]


def _together(paths: Iterable[_Path]) -> list[set[_Path]]:
    """Groups of arrays that only make sense together: each weightless block, and each look-up layer
    outside of one.
    """
    paths = list(paths)
    modules = {path[1:-1] for path in paths if path[0] == "params" and path[-1] == "tables"}
    # A module that holds vectors beside its look-up layers adds up their bits: its thresholds,
    # tables, wiring and vectors are one function.
    blocks = {path[1:-1] for path in paths if path[0] == "params" and path[-1] == "vectors"}
    modules = blocks | {
        module for module in modules if not any(module[: len(block)] == block for block in blocks)
    }
    return [{path for path in paths if path[1 : 1 + len(module)] == module} for module in modules]


def _resample(
    path: _Path,
    ours: Mapping[_Path, Array | np.ndarray],
    theirs: Mapping[_Path, Array | np.ndarray],
) -> Array | None:
    """The source's positional embedding (1, tokens, d) on the target's grid, or None."""
    want, have = ours[path], theirs[path]
    if want.ndim != 3 or have.ndim != 3 or want.shape[::2] != have.shape[::2]:
        return None
    token = (*path[:-1], "cls_token")
    extra_want, extra_have = int(token in ours), int(token in theirs)
    patches = [want.shape[1] - extra_want, have.shape[1] - extra_have]
    side = math.isqrt(max(0, patches[0]))
    if any(n <= 0 or math.isqrt(n) ** 2 != n for n in patches):
        return None
    resampled = resample_positions(jnp.asarray(have, jnp.float32), (side, side), extra_have)
    first = resampled[:, :extra_have] if extra_have else want[:, :extra_want]
    return jnp.concatenate([first[:, :extra_want], resampled[:, extra_have:]], 1).astype(want.dtype)


def _names(paths: Iterable[_Path]) -> tuple[str, ...]:
    return tuple(sorted("/".join(path if path[0] == "ranges" else path[1:]) for path in paths))


def _differing(
    theirs: Mapping[_Path, Array | np.ndarray], ours: Mapping[_Path, Array | np.ndarray]
) -> str:
    """Why nothing fits: a few arrays of other shapes or, where no name is the same, a few names."""
    same = [p for p in sorted(theirs.keys() & ours.keys()) if p[0] == "params"]
    other = [p for p in same if np.shape(theirs[p]) != np.shape(ours[p]) and np.ndim(ours[p]) > 1]
    if not other:
        return f"{_examples(theirs)} there, {_examples(ours)} here"
    return "; ".join(
        f"{'/'.join(p[1:])} is {list(np.shape(theirs[p]))} there, {list(np.shape(ours[p]))} here"
        for p in other[:2]
    )


def _examples(paths: Iterable[_Path]) -> str:
    names = _names(paths)
    return ", ".join(names[:: max(1, len(names) // 3)][:3]) or "nothing"


def _summary(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Names cut down to the outermost modules that share nothing with `others`, blocks joined:
    'block_*/mlp', of some blocks 'block_{0,2}/mlp'.
    """
    kept = {prefix for name in others for prefix in _prefixes(name)}
    outermost = {next((p for p in _prefixes(name) if p not in kept), name) for name in names}
    matches = [re.match(r"(?:ranges/)?(block_\d+)", name) for name in {*names, *kept}]
    blocks = {match[1] for match in matches if match}
    joined: dict[str, list[int]] = {}
    for name in sorted(outermost):
        match = re.match(r"((?:ranges/)?block_)(\d+)(.*)", name)
        numbers = joined.setdefault(f"{match[1]}%{match[3]}" if match else name, [])
        numbers += [int(match[2])] if match else []
    said = []
    for name, numbers in joined.items():
        some = ",".join(map(str, sorted(numbers)))
        if len(numbers) > 1:
            some = "*" if len(numbers) == len(blocks) else f"{{{some}}}"
        said.append(name.replace("%", some))
    return sorted(said, key=lambda name: (name.startswith("ranges"), "block_" in name, name))


def _prefixes(name: str) -> list[str]:
    """'a/b/c' -> ['a', 'a/b', 'a/b/c']."""
    parts = name.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
