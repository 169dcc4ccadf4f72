"""A Transformer++ as one GGUF file, which llama.cpp and what is built on it run: weights, shape,
rotary positions and tokenizer.

Of a model with sub-norms the architecture is 'bitnet', of others 'llama'. llama.cpp computes with
float activations, or with 8 bits a block of 32 or 256 of them; ternary layers here round a whole
token's to 8 bits, so that their results are near each other, not the same.

Dimensions: d model width, I inputs, O outputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from quweit_jax.data.tokenizers import Tokenizer
from quweit_jax.deploy import gguf_tokens
from quweit_jax.errors import InputError, check_choice, require
from quweit_jax.layers.rotary import frequencies
from quweit_jax.models.stack import is_scanned, unstacked
from quweit_jax.models.transformer_pp import TransformerPP, TransformerPPConfig
from quweit_jax.ops.ternary import quantize_weights
from quweit_jax.reading import shown, why

# Name -> (type of matrices, of ternary ones, number of the file's type, inputs a block).
FORMS = {
    "f16": ("F16", "F16", "MOSTLY_F16", 1),
    "q8_0": ("Q8_0", "Q8_0", "MOSTLY_Q8_0", 32),
    "tq2_0": ("F16", "TQ2_0", "MOSTLY_TQ2_0", 256),
}


def check_target(path: Path, overwrite: bool) -> None:
    """Raises InputError unless a file may be written there."""
    if os.path.isdir(path):
        raise InputError(f"--out: expected a file such as model.gguf, found the folder {path}.")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"--out: {path} is there already; name another, or --overwrite.")


def check(model: nn.Module, form: str) -> TransformerPPConfig:
    """The config of a model that GGUF has an architecture for.

    Raises:
      InputError: it has none, or not in this form; names the option.
    """
    check_choice("--form", form, FORMS)
    if not isinstance(model, TransformerPP):
        raise InputError(
            "gguf: expected a transformer_pp model, the layout of Llama and BitNet, found "
            f"{type(model).__name__}; llama.cpp has no architecture for it."
        )
    c = model.config
    width, _, heads = c.sizes()
    head = c.head_width or width // heads
    other = ("dynamic", "llama3") if c.sub_norms else ("dynamic",)
    for key, found, expected in (
        ("mlp", "+".join(sorted(set(c.mlps()))), "dense"),
        ("mixer", "+".join(sorted(set(c.mixers()))), "attention"),
        ("activation", c.activation, "silu"),
        ("tie_embeddings", c.tie_embeddings or not c.sub_norms, True),
        ("biases", c.biases if c.sub_norms else "none", "none"),
        ("head_width", head if c.sub_norms else width // heads, width // heads),
        ("rope.kind", c.rope.kind if c.rope.kind in other else "default", "default"),
        ("rope.truncate", c.rope.truncate or c.rope.kind != "yarn", True),
    ):
        if found != expected:
            why_so = " of models with sub-norms" if c.sub_norms else ""
            raise InputError(
                f"gguf: model.{key}: expected {expected!r}, found {found!r}; llama.cpp's "
                f"architecture{why_so} computes nothing else."
            )
    if form == "tq2_0" and c.linear != "ternary":
        raise InputError(
            f"--form: expected f16 or q8_0 of a model with model.linear={c.linear}, found tq2_0, "
            "which holds ternary weights alone."
        )
    block = FORMS[form][3]
    for key, size in (("width", width), ("hidden", c.hidden_width()), ("heads", heads * head)):
        if size % block:
            raise InputError(
                f"--form: {form} holds rows in blocks of {block}, found model.{key} of {size}; "
                "take f16."
            )
    return c


def save(
    path: Path,
    model: nn.Module,
    variables: Mapping[str, PyTree],
    tokenizer: Tokenizer,
    form: str = "f16",
    *,
    name: str = "quweit_jax",
    overwrite: bool = False,
) -> int:
    """Writes a GGUF file; returns its bytes.

    Args:
      variables: {'params': ...} as trained. tokenizer: the model's own, see `gguf_tokens`.
      form: of matrices: 'f16', 'q8_0' (8 bits, a scale a block of 32), or 'tq2_0' (ternary ones at
        2 bits, the others in f16). Vectors are float32.
      name: of the model, for people.

    Raises:
      InputError: llama.cpp has no architecture for the model (`check`) or no tokenizer like this
        one, the variables are packed, or the file cannot be written.
    """
    check_target(path, overwrite)
    c = check(model, form)
    if "packed" in variables or "params" not in variables:
        raise InputError(
            "gguf: expected variables as trained, found a packed form; write the folder again with "
            "pack --trained, or give --workdir."
        )
    library = require("gguf", "to write a GGUF file")
    writer = library.GGUFWriter(None, "bitnet" if c.sub_norms else "llama")
    _describe(writer, library, c, name, form)
    for key, value in gguf_tokens.fields(tokenizer, c.vocab_size).items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    params = jax.device_get(_unstacked(model, variables))
    for key, (array, kind) in _tensors(c, params, form).items():
        _add_tensor(writer, library, key, array, kind)
    part = path.with_name(path.name + ".part")
    try:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"--out: {shown(path)} cannot be written ({why(error)}).") from None
    return path.stat().st_size


def _unstacked(model: nn.Module, variables: Mapping[str, PyTree]) -> PyTree:
    params = {"params": variables["params"]}
    return (unstacked(params) if is_scanned(model) else params)["params"]


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _describe(
    writer: Any, library: ModuleType, c: TransformerPPConfig, name: str, form: str
) -> None:
    width, layers, heads = c.sizes()
    head = c.head_width or width // heads
    fields: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "context_length": c.context,
        "embedding_length": width,
        "block_count": layers,
        "feed_forward_length": c.hidden_width(),
        "attention.head_count": heads,
        "attention.head_count_kv": c.kv_heads or heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(c.epsilon),
        "rope.dimension_count": head,
        "rope.freq_base": float(c.rope_theta),
    }
    if c.rope.kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": c.rope.kind, "rope.scaling.factor": float(c.rope.factor)}
    if c.rope.kind == "yarn":
        own = type(c.rope)("yarn", c.rope.factor).magnitude()
        fields |= {
            "rope.scaling.original_context_length": c.rope.original_context or c.context,
            "rope.scaling.attn_factor": c.rope.magnitude() / own,
            "rope.scaling.yarn_beta_fast": float(c.rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(c.rope.beta_slow),
        }
    writer.add_name(name)
    writer.add_file_type(int(library.LlamaFileType[FORMS[form][2]]))
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    for key, value in fields.items():
        _add(writer, f"{writer.arch}.{key}", value)


def _add_tensor(writer: Any, library: ModuleType, name: str, array: np.ndarray, kind: str) -> None:
    numbers = library.GGMLQuantizationType[kind]
    data = library.quants.quantize(np.ascontiguousarray(array, np.float32), numbers)
    writer.add_tensor(name, data, raw_dtype=numbers)


def _tensors(
    c: TransformerPPConfig, params: Mapping[str, Any], form: str
) -> dict[str, tuple[np.ndarray, str]]:
    """GGUF's tensors by name: (array (O, I) or (d,), type)."""
    dense, ternary = FORMS[form][:2]
    found: dict[str, tuple[np.ndarray, str]] = {
        "token_embd.weight": (params["token_embedding"]["embedding"], dense),
        "output_norm.weight": (params["final_norm"]["scale"], "F32"),
    }
    if not c.tie_embeddings:
        found["output.weight"] = (params["head"]["kernel"].T, dense)
    if c.rope.kind == "llama3":
        half = (c.head_width or c.sizes()[0] // c.sizes()[2]) // 2
        original = c.rope.original_context or c.context
        plain = c.rope_theta ** (-np.arange(half) / half)
        slower = plain / frequencies(c.rope_theta, half, c.rope, original)
        found["rope_freqs.weight"] = (slower, "F32")
    for i in range(c.sizes()[1]):
        for name, array in _vectors(c, params[f"block_{i}"]):
            found[f"blk.{i}.{name}"] = (array, "F32")
        for name, kernel in _matrices(c, params[f"block_{i}"]):
            given, kind, scale = kernel.T, dense, None
            if c.linear == "ternary":
                whole, scale = (np.asarray(part) for part in quantize_weights(jnp.asarray(kernel)))
                given, kind = whole.T.astype(np.float32), ternary
            if not c.sub_norms:
                given = _turned(c, name, given if scale is None else given * scale)
            elif scale is not None:
                found[f"blk.{i}.{name}.scale"] = (scale.reshape(1), "F32")
            found[f"blk.{i}.{name}.weight"] = (given, kind)
    return found


def _matrices(c: TransformerPPConfig, block: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, kernel (I, O)) of a block."""
    mixer, mlp = block["mixer"], block["mlp"]
    if c.linear == "ternary":
        for name, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            yield f"attn_{name}", mixer[ours]["kernel"]
        yield "ffn_gate", mlp["gate"]["kernel"]
        yield "ffn_up", mlp["up"]["kernel"]
    else:
        for name, part in zip("qkv", np.split(mixer["qkv"]["kernel"], _ends(c), axis=1)):
            yield f"attn_{name}", part
        gate, up = np.split(mlp["gate"]["kernel"], 2, axis=1)
        yield "ffn_gate", gate
        yield "ffn_up", up
    yield "attn_output", mixer["proj"]["kernel"]
    yield "ffn_down", mlp["down"]["kernel"]


def _vectors(c: TransformerPPConfig, block: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, vector) of a block."""
    yield "attn_norm.weight", block["mixer_norm"]["scale"]
    yield "ffn_norm.weight", block["mlp_norm"]["scale"]
    if c.sub_norms:
        yield "attn_sub_norm.weight", block["mixer"]["sub_norm"]["scale"]
        yield "ffn_sub_norm.weight", block["mlp"]["sub_norm"]["scale"]
    if c.biases != "none":
        for name, part in zip("qkv", np.split(block["mixer"]["qkv"]["bias"], _ends(c))):
            yield f"attn_{name}.bias", _turned(c, f"attn_{name}", part)
    if c.biases == "attention":
        yield "attn_output.bias", block["mixer"]["proj"]["bias"]


def _ends(c: TransformerPPConfig) -> list[int]:
    """Where queries and keys end among queries, keys and values side by side."""
    width, _, heads = c.sizes()
    head = c.head_width or width // heads
    return [heads * head, (heads + (c.kv_heads or heads)) * head]


def _turned(c: TransformerPPConfig, name: str, rows: np.ndarray) -> np.ndarray:
    """Rows (O, ...) of queries or keys in the order of the architecture 'llama', whose rotary pairs
    are neighbors; of other matrices as they are.
    """
    heads = c.sizes()[2]
    count = {"attn_q": heads, "attn_k": c.kv_heads or heads}.get(name)
    if count is None:
        return rows
    halves = rows.reshape(count, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
