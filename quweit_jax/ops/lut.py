"""Look-up tables (LUTs) trained with the extended finite difference (EFD) rule: Bacellar
et al., "Differentiable Weightless Neural Networks", ICML 2024 (arXiv 2410.11112).

Dimensions: F input bits, T tokens (all leading dimensions flattened), L tables, n inputs a table, A
= 2**n entries.

Everything inside is feature-major, (F, T) and (L, T): a look-up is then a tree of vectorized
selects instead of a gather, and following the wiring copies whole rows.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Float64, Int, Shaped

from quweit_jax.errors import InputError, check_choice
from quweit_jax.ops.fusion import no_fusion
from quweit_jax.ops.kernels import lut_native, lut_reference, lut_xla
from quweit_jax.ops.kernels.choice import (
    Division,
    Hindrance,
    anywhere,
    choose,
    division,
    kernels_at,
    platform,
)
from quweit_jax.ops.kernels.native import calls

MAX_LUT_INPUTS = 8
DECAYS = ("exponential", "harmonic")


class EFD(NamedTuple):
    """The weighting of the finite differences; hashable, so that it can be a static argument."""

    decay: str
    alpha: float
    beta: float


def efd_weighting(
    lut_inputs: int,
    decay: str = "exponential",
    alpha: float | None = None,
    beta: float | None = None,
) -> EFD:
    """A weighting, with defaults for what is None: alpha = 0.5 * 0.75**(n-1) and beta = 1/3
    (exponential); harmonic is 1 / (h + 1), times alpha if given.
    """
    check_choice("lut_lookup: decay", decay, DECAYS)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value is not None and not math.isfinite(value):
            raise InputError(f"lut_lookup: expected a finite {name}, found {value}.")
    if decay == "harmonic":
        if beta is not None:
            raise InputError(
                "lut_lookup: beta belongs to decay='exponential'; the harmonic weighting 1 / (h + "
                "1) has none. Leave it out."
            )
        return EFD(decay, 1.0 if alpha is None else float(alpha), 0.0)
    return EFD(
        decay,
        0.5 * 0.75 ** (lut_inputs - 1) if alpha is None else float(alpha),
        1 / 3 if beta is None else float(beta),
    )


def efd_matrix(lut_inputs: int, weighting: EFD) -> Float64[np.ndarray, "n R A"]:
    """The linear map from a table to the finite differences of each input: float64, shape (n, A /
    2, A).

    Row (l, r) holds sign_l(a) * w(H_l(a, addr)) for every entry a, where r is the address without
    bit l (bits above l moved down by one): the finite difference does not depend on bit l itself.
    """
    if not 1 <= lut_inputs <= MAX_LUT_INPUTS:
        raise InputError(f"efd_matrix: expected 1 to 8 inputs a table, found {lut_inputs}.")
    n = lut_inputs
    entries = np.arange(2**n)
    rest = np.arange(2 ** (n - 1))
    out = np.zeros((n, 2 ** (n - 1), 2**n))
    for l in range(n):
        sign = 2.0 * ((entries >> l) & 1) - 1.0
        without = _drop_bit(entries, l)
        distance = np.bitwise_count((rest[:, None] ^ without[None, :]).astype(np.uint32)).astype(
            np.float64
        )
        weight = weighting.alpha * (
            weighting.beta**distance if weighting.decay == "exponential" else 1.0 / (distance + 1.0)
        )
        out[l] = sign * weight
    return out


def _drop_bit(address: np.ndarray, l: int) -> np.ndarray:
    return (address & ((1 << l) - 1)) | ((address >> (l + 1)) << l)


def finite_differences(tables: Float[Array, "L A"], weighting: EFD) -> Float[Array, "n L R"]:
    """D[l, j, r], the EFD gradient of table j with respect to its input l where the other inputs
    spell r: (n, L, A / 2).

    Made once per step, not per sample. float32 whatever the tables' dtype.
    """
    lut_inputs = tables.shape[-1].bit_length() - 1
    matrix = jnp.asarray(efd_matrix(lut_inputs, weighting), jnp.float32)
    return jnp.einsum("lra,ja->ljr", matrix, tables.astype(jnp.float32), precision="highest")


_FORMS: dict[str, ModuleType] = {"xla": lut_xla, "reference": lut_reference}


class _How(NamedTuple):
    """What of a look-up is no array."""

    weighting: EFD
    implementation: str
    division: Division | None
    kernels: str = ""  # 'tpu' or 'gpu', whose kernels 'pallas' are


def _choose(asked: str | None, weighting: EFD, sizes: tuple[Any, ...], dtype: DTypeLike) -> _How:
    """How to look up F bits of T tokens in L tables, sizes (F, T, L)."""
    known = not any(map(jax.export.is_symbolic_dim, sizes))
    offered: dict[str, Hindrance] = dict.fromkeys(_FORMS, anywhere)
    if asked or (known and lut_native.is_worth(sizes[1])):
        offered = {"native": lut_native.hindrance(dtype, known)} | offered
    if asked == "pallas" or (asked is None and platform() in ("tpu", "gpu")):
        kernels = _kernels(kernels_at())
        if asked or (known and kernels.is_worth(*sizes[1:])):
            offered = {"pallas": kernels.hindrance(*sizes, known)} | offered
    chosen = choose("lut_lookup", asked, offered)
    if chosen not in ("native", "pallas"):
        return _How(weighting, chosen, None)
    of_kernels = division() if chosen == "pallas" else None
    return _How(weighting, chosen if all(sizes) else "xla", of_kernels, kernels_at())


def _kernels(at: str) -> ModuleType:
    if at == "gpu":  # importing Pallas takes half a second
        from quweit_jax.ops.kernels.gpu import lut
    else:
        from quweit_jax.ops.kernels import lut_pallas as lut
    return lut


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _lookup(
    bits_FT: Array, mapping_Ln: Array, inverse_FK: Array | None, tables_LA: Array, how: _How
) -> Array:
    return _lookup_forward(bits_FT, mapping_Ln, inverse_FK, tables_LA, how)[0]


def _lookup_forward(bits_FT, mapping_Ln, inverse_FK, tables_LA, how):
    if how.implementation == "pallas":
        out, kept = _kernels(how.kernels).forward(bits_FT, mapping_Ln, tables_LA, how.division)
    elif how.implementation == "native":
        out, kept = lut_native.forward(bits_FT != 0, mapping_Ln, tables_LA)
    else:
        kept = bits_FT != 0
        out = _FORMS[how.implementation].forward(kept, mapping_Ln, tables_LA)
    # An empty array carries the number of bits and their dtype, which are no values JAX can save.
    return out, (
        kept,
        jnp.zeros((bits_FT.shape[0], 0), bits_FT.dtype),
        mapping_Ln,
        inverse_FK,
        tables_LA,
    )


def _lookup_backward(how, saved, grad_LT):
    kept, bits_like, mapping_Ln, inverse_FK, tables_LA = saved
    grad_LT, num_inputs = grad_LT.astype(jnp.float32), bits_like.shape[0]
    to_bits = jnp.issubdtype(bits_like.dtype, jnp.floating)
    differences = finite_differences(tables_LA, how.weighting) if to_bits else None
    grad_bits = None
    if how.implementation == "native":
        grad_tables, grad_bits = lut_native.gradients(
            kept, mapping_Ln, differences, grad_LT, num_inputs
        )
    elif how.implementation == "pallas":
        kernels = _kernels(how.kernels)
        grad_tables = kernels.table_gradient(kept, mapping_Ln, grad_LT, how.division)
        if differences is not None:
            grad_bits = kernels.bit_gradient(
                kept, mapping_Ln, inverse_FK, differences, grad_LT, num_inputs, how.division
            )
    else:
        form = _FORMS[how.implementation]
        grad_tables = form.table_gradient(kept, mapping_Ln, grad_LT)
        if differences is not None:
            grad_bits = form.bit_gradient(kept, mapping_Ln, inverse_FK, differences, grad_LT)
    grad_tables = grad_tables.astype(tables_LA.dtype)
    grad_bits = None if grad_bits is None else grad_bits.astype(bits_like.dtype)
    return grad_bits, None, None, grad_tables


_lookup.defvjp(_lookup_forward, _lookup_backward)


def lut_lookup(
    bits: Shaped[ArrayLike, "*tokens F"],
    mapping: Int[ArrayLike, "L n"],
    tables: Float[ArrayLike, "L A"],
    *,
    decay: str = "exponential",
    alpha: float | None = None,
    beta: float | None = None,
    inverse: Int[ArrayLike, "F K"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*tokens L"]:
    """Reads every table at the address its input bits spell; the gradient is the extended finite
    difference.

    `out[..., j] = tables[j, sum_l bits[..., mapping[j, l]] << l]`: slot 0 is the least significant
    bit (arXiv 2410.11112, section 3). The gradient to the tables goes to the addressed entry alone;
    the gradient to a bit sums, over the tables that read it, g * sum_a sign_l(a) * tables[j, a] *
    w(H), H the Hamming distance to the address without that bit.

    Args:
      bits: (..., F), 0 or 1, any real or bool dtype. Only a floating dtype receives gradients.
      mapping: (L, n) int, the input each slot reads, 0 <= mapping < F; n from 1 to 8.
      tables: (L, 2**n) floating.
      decay: 'exponential', w(h) = alpha * beta**h, or 'harmonic', w(h) = alpha / (h + 1).
      alpha: scale of the gradient to the bits; 0.5 * 0.75**(n-1) (exponential) or 1 (harmonic) if
        None.
      beta: decay per unit of distance; 1/3 if None.
      inverse: (F, K) int from `wiring.invert_wiring`, optional: without it the gradient to the
        bits makes one anew each time, if the wiring is even, or scatters.
      implementation: 'native' (on one device, or inside `jax.shard_map`), 'xla', 'pallas' (kernels
        for TPUs and GPUs) or 'reference', see `ops.kernels`; None for the fastest.

    Returns:
      (..., L), the tables' dtype.

    Raises:
      InputError: shapes that do not fit, n > 8, or a mapping known at trace time that refers to an
        input that isn't there, or an implementation that the platform lacks.
    """
    bits, mapping, tables = jnp.asarray(bits), _as_index(mapping), jnp.asarray(tables)
    weighting = check_lut_arguments(
        bits.shape[-1] if bits.ndim else None, mapping, tables, decay, alpha, beta
    )
    tokens_TF = bits.reshape(math.prod(bits.shape[:-1]), bits.shape[-1])
    sizes = (*tokens_TF.shape[::-1], tables.shape[0])
    how = _choose(implementation, weighting, sizes, tables.dtype)
    mapping, inverse = jnp.asarray(mapping), None if inverse is None else jnp.asarray(inverse)
    if how.implementation == "pallas":
        turned: Array = _lookup(tokens_TF.T, mapping, inverse, tables, how)
        values = turned.T
    else:
        values: Array = _lookup_tokens(*_alike(how, tokens_TF, mapping, inverse, tables), how)
    return values.reshape(*bits.shape[:-1], tables.shape[0])


def _alike(
    how: _How, bits: Array, mapping: Array, inverse: Array | None, tables: Array
) -> tuple[Array, Array, Array | None, Array]:
    """The arrays; for native code, alike inside `jax.shard_map`, and without the inverse."""
    if how.implementation != "native":
        return bits, mapping, inverse, tables
    bits, mapping, tables = calls.varying_alike(bits, mapping, tables)
    return bits, mapping, None, tables


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _lookup_tokens(
    bits_TF: Array, mapping_Ln: Array, inverse_FK: Array | None, tables_LA: Array, how: _How
) -> Array:
    return _lookup_tokens_forward(bits_TF, mapping_Ln, inverse_FK, tables_LA, how)[0]


def _lookup_tokens_forward(bits_TF, mapping_Ln, inverse_FK, tables_LA, how):
    like = jnp.zeros((bits_TF.shape[1], 0), bits_TF.dtype)
    if how.implementation == "native":
        values_LT, kept = lut_native.forward(calls.turned(bits_TF != 0), mapping_Ln, tables_LA)
        return calls.turned(values_LT), (kept, like, mapping_Ln, inverse_FK, tables_LA)
    bits_FT = (bits_TF != 0).T
    form = _FORMS[how.implementation].forward
    values_LT: Array = no_fusion(form, bits_FT, mapping_Ln, tables_LA)
    return values_LT.T, (bits_FT, like, mapping_Ln, inverse_FK, tables_LA)


def _lookup_tokens_backward(how, saved, grad_TL):
    if how.implementation == "native":
        grad_bits, _, _, grad_tables = _lookup_backward(how, saved, calls.turned(grad_TL))
        return None if grad_bits is None else calls.turned(grad_bits), None, None, grad_tables
    bits_FT, bits_like, *operands = saved

    def backward(
        bits_FT: Array, grad_LT: Array, *operands: Array | None
    ) -> tuple[Array | None, Array]:
        grad_bits, _, _, grad_tables = _lookup_backward(
            how, (bits_FT, bits_like, *operands), grad_LT
        )
        return grad_bits, grad_tables

    grad_bits, grad_tables = no_fusion(backward, bits_FT, grad_TL.T, *operands)
    return None if grad_bits is None else grad_bits.T, None, None, grad_tables


_lookup_tokens.defvjp(_lookup_tokens_forward, _lookup_tokens_backward)


def lut_lookup_feature_major(
    bits_FT: Shaped[Array, "F T"],
    mapping: Int[ArrayLike, "L n"],
    tables: Float[Array, "L A"],
    *,
    decay: str = "exponential",
    alpha: float | None = None,
    beta: float | None = None,
    inverse: Int[Array, "F K"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "L T"]:
    """`lut_lookup` for bits that are already (F, T), as they are inside a block: returns (L, T) and
    transposes nothing.
    """
    mapping = _as_index(mapping)
    weighting = check_lut_arguments(bits_FT.shape[0], mapping, tables, decay, alpha, beta)
    sizes = (*bits_FT.shape, tables.shape[0])
    how = _choose(implementation, weighting, sizes, tables.dtype)
    return _lookup(*_alike(how, bits_FT, jnp.asarray(mapping), inverse, tables), how)


def _as_index(mapping: ArrayLike) -> Array | np.ndarray:
    return mapping if isinstance(mapping, jax.Array) else np.asarray(mapping)


def check_lut_arguments(
    num_inputs: int | None,
    mapping: Shaped[Array | np.ndarray, "..."],
    tables: Shaped[Array, "..."],
    decay: str,
    alpha: float | None,
    beta: float | None,
) -> EFD:
    """Raises InputError for what `lut_lookup` cannot work with; returns the weighting."""
    if num_inputs is None:
        raise InputError(
            "lut_lookup: bits has no dimensions; expected (..., F). Add an axis: bits[None]."
        )
    if mapping.ndim != 2 or not jnp.issubdtype(mapping.dtype, jnp.integer):
        raise InputError(
            "lut_lookup: mapping must be an integer array (L, n), found "
            f"{mapping.dtype}{list(mapping.shape)}."
        )
    num_luts, lut_inputs = mapping.shape
    if not 1 <= lut_inputs <= MAX_LUT_INPUTS:
        raise InputError(
            f"lut_lookup: a table can have 1 to {MAX_LUT_INPUTS} inputs, mapping "
            f"{list(mapping.shape)} asks for {lut_inputs}; use more, smaller tables."
        )
    if tables.shape != (num_luts, 2**lut_inputs):
        raise InputError(
            f"lut_lookup: {num_luts} tables of {lut_inputs} inputs must have shape "
            f"{[num_luts, 2**lut_inputs]} (2**{lut_inputs} entries each), "
            f"found {list(tables.shape)}."
        )
    if not jnp.issubdtype(tables.dtype, jnp.floating):
        raise InputError(
            f"lut_lookup: tables must be floating, found {tables.dtype}; convert them with "
            ".astype(jnp.float32)."
        )
    if num_luts and not isinstance(mapping, Tracer):
        known = np.asarray(mapping)
        bad = known[(known < 0) | (known >= num_inputs)]
        if bad.size:
            valid = f"valid: 0..{num_inputs - 1}" if num_inputs else "none is valid"
            raise InputError(
                f"lut_lookup: mapping refers to input {bad[0]} but bits has {num_inputs} inputs "
                f"({valid})."
            )
    return efd_weighting(lut_inputs, decay, alpha, beta)


@jax.custom_jvp
def binarize(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Turns values into bits, 1 where they are > 0, else 0, in the same dtype; the gradient is the
    identity's.
    """
    return (values > 0).astype(values.dtype)


@binarize.defjvp
def _binarize_jvp(primals, tangents):
    return binarize(primals[0]), tangents[0]
