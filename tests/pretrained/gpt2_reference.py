"""GPT-2 by its published program's formulas in NumPy, and small checkpoints of it."""

import json
import math

import numpy as np
from safetensors.numpy import save_file

CONTEXT, LAYERS, HEADS, WIDTH = 12, 3, 2, 16
BASE = {
    "model_type": "gpt2",
    "n_positions": CONTEXT,
    "vocab_size": 37,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_embd": WIDTH,
}
_TANH = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731
_ERF = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))
GELUS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"), _TANH),
    **dict.fromkeys(("gelu", "gelu_python"), _ERF),
}


def weights(seed=0):
    """Random weights of the published names and layout."""
    draw = np.random.default_rng(seed)
    found = {
        "wte.weight": draw.normal(0, 0.3, (37, WIDTH)),
        "wpe.weight": draw.normal(0, 0.3, (CONTEXT, WIDTH)),
    }
    norms = ["ln_f", *(f"h.{i}.{n}" for i in range(LAYERS) for n in ("ln_1", "ln_2"))]
    for name in norms:
        found[f"{name}.weight"] = draw.normal(1, 0.1, WIDTH)
        found[f"{name}.bias"] = draw.normal(0, 0.1, WIDTH)
    for i in range(LAYERS):
        for name, inputs, outputs in (
            ("attn.c_attn", 1, 3),
            ("attn.c_proj", 1, 1),
            ("mlp.c_fc", 1, 4),
            ("mlp.c_proj", 4, 1),
        ):
            shape = (inputs * WIDTH, outputs * WIDTH)
            found[f"h.{i}.{name}.weight"] = draw.normal(0, 0.4, shape)
            found[f"h.{i}.{name}.bias"] = draw.normal(0, 0.1, shape[1])
    return {name: value.astype(np.float32) for name, value in found.items()}


def write(folder, config, tensors):
    """config.json and model.safetensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def logits(ids, w, config):
    """ids (T,) -> logits (T, V) in float64."""
    epsilon = config.get("layer_norm_epsilon", 1e-5)

    def norm(x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return y * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].astype(np.float64) + w[f"{name}.bias"]

    tokens, head = len(ids), WIDTH // HEADS
    x = w["wte.weight"][ids].astype(np.float64) + w["wpe.weight"][:tokens]
    for i in range(LAYERS):
        q, k, v = np.split(linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, -1)
        mixed = []
        for j in range(HEADS):
            part = slice(j * head, (j + 1) * head)
            scores = q[:, part] @ k[:, part].T
            if config.get("scale_attn_weights", True):
                scores = scores / math.sqrt(head)
            if config.get("scale_attn_by_inverse_layer_idx", False):
                scores = scores / (i + 1)
            scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        x = x + linear(np.concatenate(mixed, -1), f"h.{i}.attn.c_proj")
        hidden = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        gelu = GELUS[config.get("activation_function", "gelu_new")]
        x = x + linear(gelu(hidden), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T
