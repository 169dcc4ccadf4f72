"""Small models in the layouts of Hugging Face's Llama, Qwen2 and BitNet, and what the real
transformers makes of them: golden values of `test_llama_layouts`.

`python -m tests.pretrained.llama_golden` makes them again (it needs torch and transformers); with
`--check` it compares instead, packed checkpoints and such as transformers writes itself too; names
of cases behind that are those to compare.
"""

import json
import sys
from pathlib import Path

import numpy as np

from tests.pretrained.language_files import random_variables, small

FILE = Path(__file__).with_name("llama_golden.json")
LAST = 3  # positions that are kept
SCALED = {"context": 64, "rope_theta": 100.0}
_BITNET = {"width": 24, "sub_norms": True, "activation": "relu2"}
CASES = {
    "plain": {},
    "linear": SCALED | {"rope": {"kind": "linear", "factor": 4.0}},
    "dynamic": SCALED | {"rope": {"kind": "dynamic", "factor": 4.0, "original_context": 16}},
    "llama3": SCALED | {"rope": {"kind": "llama3", "factor": 8.0, "original_context": 24}},
    "yarn": SCALED
    | {"rope": {"kind": "yarn", "factor": 4.0, "original_context": 16, "beta_fast": 3.0}},
    "yarn not rounded": SCALED
    | {
        "rope": {
            "kind": "yarn",
            "factor": 4.0,
            "original_context": 16,
            "beta_fast": 2.0,
            "truncate": False,
            "attention_factor": 0.8,
        }
    },
    "biases": {"biases": "attention"},
    "biases of qwen2": {"biases": "qkv"},
    "tied": {"tie_embeddings": True},
    "squared relu": {"activation": "relu2"},
    "bitnet, dense": _BITNET,
    "bitnet": _BITNET | {"linear": "ternary", "tie_embeddings": True},
    "llama, ternary": {"linear": "ternary"},
}
PACKED = ("bitnet", "llama, ternary")  # whose packed form gives the same


def model_of(case):
    """The model of a case and its variables."""
    from quweit_jax.layers.rotary import RopeScaling

    options = {"context": 40, **CASES[case]}
    if "rope" in options:
        options["rope"] = RopeScaling(**options["rope"])
    model = small("transformer_pp", **options)
    variables = random_variables("transformer_pp", model, seed=len(case))
    scaled = {"params": _scaled(variables["params"])}
    return model, scaled


def _scaled(tree):
    """Kernels such that attention is neither flat nor of one token alone."""
    return {
        name: _scaled(value)
        if isinstance(value, dict)
        else value * np.float32(0.3 if value.ndim == 2 else 0.5)
        for name, value in tree.items()
    }


def tokens_of(case):
    """Forty tokens."""
    return np.random.default_rng(len(case) + 100).integers(0, 31, (1, 40), np.int32)


def _of_transformers(folder, tokens):
    """The real program's logits (1, 40, 31), of masters or packed weights."""
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers.integrations.bitnet import BitNetDeserialize, replace_with_bitnet_linear

    config = transformers.AutoConfig.from_pretrained(folder)
    options = getattr(config, "quantization_config", None)
    if options is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:  # as its quantizer does, which wants a package more
        del config.quantization_config
        options = transformers.BitNetQuantConfig(**options)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        replace_with_bitnet_linear(model, ["lm_head"], options)
        model = model.to_empty(device="cpu")
        tensors = load_file(folder / "model.safetensors")
        for name in [n for n in tensors if tensors[n].dtype == torch.uint8]:
            if options.linear_class == "autobitlinear":
                given = {"weight": tensors[name]}
                tensors[name] = BitNetDeserialize(None).convert(given, model, name)["weight"]
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
        rotary = model.model.rotary_emb
        fresh = type(rotary)(config)
        rotary.inv_freq = fresh.inv_freq
        rotary.original_inv_freq = fresh.original_inv_freq
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def main():
    """Writes the golden values; with --check, compares the other ways too."""
    import os
    import tempfile

    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    from quweit_jax import pretrained

    golden, checks = {}, "--check" in sys.argv
    chosen = [case for case in CASES if case in sys.argv] or list(CASES)
    for case in chosen if checks else CASES:
        model, variables = model_of(case)
        tokens = tokens_of(case)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            pretrained.save(model, variables, folder)
            logits = _of_transformers(folder, tokens)
            golden[case] = np.round(logits[0, -LAST:], 5).tolist()
            found, read = pretrained.load(folder)
            ours = np.asarray(found.apply(read, tokens))
            _say(case, ours, logits)
            if checks and case in PACKED:
                pretrained.save(model, variables, folder / "packed", packed=True)
                _say(f"{case}, packed", _of_transformers(folder / "packed", tokens), logits)
                found, read = pretrained.load(folder / "packed")
                _say(f"{case}, packed, ours", np.asarray(found.apply(read, tokens)), logits)
                config = json.loads((folder / "packed" / "config.json").read_text())
                config["quantization_config"]["linear_class"] = "bitlinear"
                (folder / "packed" / "config.json").write_text(json.dumps(config))
                _invert_scales(folder / "packed")
                inverted = _of_transformers(folder / "packed", tokens)
                _say(f"{case}, bitlinear", inverted, logits)
                found, read = pretrained.load(folder / "packed")
                _say(f"{case}, bitlinear, ours", np.asarray(found.apply(read, tokens)), logits)
    if not checks:
        FILE.write_text(json.dumps(golden) + "\n")
    for case in chosen if checks else ():
        _say_written_by_transformers(case)


def _say_written_by_transformers(case):
    """Random checkpoints in bfloat16 that transformers makes and writes load here.

    Also with norms as trained ones are: where all are 1, as at the start, rounding to 8 bits meets
    exact ties of 16-bit embeddings, which the last bit of a sum decides.
    """
    import tempfile

    import torch
    import transformers

    from quweit_jax import pretrained

    model, variables = model_of(case)
    for seed, trained in enumerate((False, True, True, True)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            pretrained.save(model, variables, folder / "ours")
            config = transformers.AutoConfig.from_pretrained(folder / "ours")
            options = getattr(config, "quantization_config", None)
            if options is not None:
                del config.quantization_config
            torch.manual_seed(seed)
            config.initializer_range = 0.3
            theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            for path, parameter in theirs.named_parameters() if trained else ():
                if "norm" in path:
                    parameter.data.uniform_(0.5, 1.5)
            theirs.save_pretrained(folder / "theirs")
            if options is not None:
                file = folder / "theirs" / "config.json"
                written = json.loads(file.read_text()) | {"quantization_config": options}
                file.write_text(json.dumps(written))
            expected = _of_transformers(folder / "theirs", tokens_of(case))
            found, read = pretrained.load(folder / "theirs")
            logits = np.asarray(found.apply(read, tokens_of(case)))
            _say(f"{case}, theirs, {'norms as trained' if trained else 'at 1'}", logits, expected)


def _invert_scales(folder):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    inverted = {n: 1 / v if n.endswith("weight_scale") else v for n, v in tensors.items()}
    save_file(inverted, folder / "model.safetensors", {"format": "pt"})


def _say(case, found, expected):
    far = np.abs(found - expected).max() / np.ptp(expected)
    print(f"{case}: {far:.1e} of the logits' range", flush=True)


if __name__ == "__main__":
    main()
