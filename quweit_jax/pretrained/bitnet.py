"""Ternary weights as Hugging Face's programs keep them (`quant_method: bitnet`): masters that are
made ternary as they are used, or whole numbers at two bits with a scale a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from quweit_jax.errors import InputError
from quweit_jax.ops.ternary import quantize_weights
from quweit_jax.pretrained.layout import TensorMap, TensorOut
from quweit_jax.pretrained.lazy_tensors import DerivedTensor, LazyTensor
from quweit_jax.pretrained.published_config import PublishedConfig
from quweit_jax.pretrained.tensors import Tensors

_KNOWN = (
    *("quant_method", "modules_to_not_convert", "linear_class", "quantization_mode"),
    *("use_rms_norm", "rms_norm_eps"),
)
_SHIFTS = (0, 2, 4, 6)


def read(config: PublishedConfig) -> tuple[str, str] | None:
    """(linear_class, quantization_mode) of config.json's `quantization_config`; None without one.

    Raises:
      InputError: another method, or an option that changes what is computed.
    """
    options = config.get("quantization_config")
    if options is None:
        return None
    key = "quantization_config"
    if not isinstance(options, dict) or options.get("quant_method") != "bitnet":
        raise config.error(
            key, "ternary weights, quant_method 'bitnet'", options, "others are not supported."
        )
    unknown = sorted(name for name in options if name not in _KNOWN)
    if unknown or options.get("use_rms_norm"):
        raise config.error(
            key,
            f"{', '.join(_KNOWN[:4])}",
            options,
            f"{unknown or 'use_rms_norm'} is unknown here.",
        )
    if options.get("modules_to_not_convert") not in (None, [], ["lm_head"]):
        raise config.error(
            f"{key}.modules_to_not_convert",
            '["lm_head"]',
            options["modules_to_not_convert"],
            "all projections are ternary here, and the head is not.",
        )
    found = []
    for name, choices in (
        ("linear_class", ("bitlinear", "autobitlinear")),
        ("quantization_mode", ("offline", "online")),
    ):
        value = options.get(name) or choices[0]
        if value not in choices:
            raise config.error(f"{key}.{name}", " or ".join(choices), value)
        found.append(value)
    if found == ["bitlinear", "online"]:
        raise config.error(
            f"{key}.linear_class", "autobitlinear with quantization_mode online", found
        )
    return found[0], found[1]


def written(packed: bool) -> dict[str, object]:
    """The `quantization_config` of what is written here."""
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline" if packed else "online",
        "modules_to_not_convert": ["lm_head"],
    }


def ternary(maps: Iterable[TensorMap]) -> dict[str, tuple[int, ...]]:
    """The published names and shapes of the matrices that are ternary: all but the head."""
    return {
        name: shape
        for ours in maps
        if ours.transposed and ours.path != "head/kernel"
        for name, shape in ours.tensors.items()
    }


def unpack(tensors: Tensors, matrices: Mapping[str, tuple[int, ...]], linear_class: str) -> None:
    """Puts float weights in the place of whole numbers with a scale, whether they are packed or
    not: such that making them ternary again gives those numbers and that scale.

    matrices: published names and shapes (outputs, inputs).

    Raises:
      InputError: a scale is missing or impossible, or weights are not -1, 0 and 1 (named).
    """
    for name, shape in matrices.items():
        scale_name = f"{name.removesuffix('.weight')}.weight_scale"
        tensor, found = tensors.lazy(name), tensors.peek(scale_name)
        if tensor is None:
            continue  # whoever takes it says so
        if found is None or found.size != 1 or not 0 < float(found.reshape(())) < np.inf:
            raise InputError(
                f"pretrained: tensor {scale_name}: expected one positive number, found "
                f"{'none' if found is None else found.reshape(-1)[:3]}; take another checkpoint."
            )
        scale = np.float32(found.reshape(()))
        scale = 1 / scale if linear_class == "bitlinear" else scale
        is_packed = tensor.shape == (shape[0] // 4, *shape[1:]) and shape[0] % 4 == 0
        if is_packed or tensor.shape == shape:
            tensors.replace(name, _masters(name, tensor, shape, float(scale), is_packed))
    tensors.drop(".weight_scale")


def _masters(
    name: str, tensor: LazyTensor, shape: tuple[int, ...], scale: float, is_packed: bool
) -> DerivedTensor:
    def make() -> np.ndarray:
        numbers = np.asarray(tensor)
        if is_packed:
            codes = numbers.astype(np.uint8)
            numbers = (
                np.concatenate([(codes >> shift) & 3 for shift in _SHIFTS]).astype(np.int8) - 1
            )
        whole = numbers.astype(np.float32)
        if not np.isin(whole, (-1, 0, 1)).all():
            raise InputError(
                f"pretrained: tensor {name}: expected weights of -1, 0 and 1, found others; is the "
                "file damaged?"
            )
        # The mean magnitude of what comes out is to be the scale: as the layer sums it, which for
        # large matrices is not to the last digit.
        found = whole * np.float32(scale / max(np.abs(whole).mean(dtype=np.float64), 1e-12))
        summed = float(quantize_weights(jnp.asarray(found.T))[1]) if whole.any() else scale
        return found * np.float32(scale / summed)

    return DerivedTensor(shape, make)


class _Packed(TensorOut):
    """A ternary matrix (outputs, inputs) at two bits: uint8 (outputs / 4, inputs)."""

    itemsize = 1

    def make(self) -> np.ndarray:
        """Byte [r, i] holds the weights r, r + outputs / 4, ... of input i, lowest bits first."""
        weights = _quantized(self)[0]
        quarters = np.split((weights + 1).astype(np.uint8), 4)
        return np.bitwise_or.reduce([q << s for q, s in zip(quarters, _SHIFTS)])


class _Scale(TensorOut):
    """A ternary matrix's scale, float32 (1,)."""

    def make(self) -> np.ndarray:
        """One number."""
        return _quantized(self)[1].reshape(1)


def _quantized(tensor: TensorOut) -> tuple[np.ndarray, np.ndarray]:
    """(-1, 0 and 1 as int8 (outputs, inputs), the scale ()) of a whole kernel of ours."""
    whole, scale = quantize_weights(jnp.asarray(tensor.array))
    return np.asarray(whole).T, np.asarray(scale)


def pack(tensors: Mapping[str, TensorOut], matrices: Mapping[str, Any]) -> dict[str, TensorOut]:
    """Tensors to be written, with those of ternary matrices at two bits and a scale each.

    matrices: their names.

    Raises:
      InputError: a matrix whose outputs are no multiple of 4 (named).
    """
    found: dict[str, TensorOut] = {}
    for name, tensor in tensors.items():
        if name not in matrices:
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        if rows % 4:
            raise InputError(
                f"pretrained.save: {name}: expected outputs in multiples of 4 for two bits a "
                f"weight, found {rows}; write the masters, packed=False."
            )
        given = (tensor.array, tensor.start, tensor.transposed)
        found[name] = _Packed((rows // 4, columns), *given)
        found[f"{name.removesuffix('.weight')}.weight_scale"] = _Scale((1,), *given)
    return found
