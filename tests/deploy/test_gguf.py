"""`deploy.gguf`: what is written, by GGUF's own reader where it is installed;
`benchmarks/run_gguf.py` has llama.cpp run it.
"""

import sys

import jax
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.data import tokenizers
from quweit_jax.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, FileTokenizer
from quweit_jax.deploy import gguf, gguf_tokens
from quweit_jax.errors import InputError
from quweit_jax.ops.ternary import quantize_weights

TOKENIZER = CharTokenizer("\n ab\\é")
LLAMA = {"name": "transformer_pp", "width": 32, "layers": 2, "heads": 4, "kv_heads": 2}
LLAMA |= {"context": 24, "hidden": 64}
BITNET = LLAMA | {"linear": "ternary", "sub_norms": True, "tie_embeddings": True}


def made(options, seed=0):
    """A model of six characters and its variables, none of them at its start."""
    model = models.build(options, TOKENIZER.vocab_size)
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))
    draw = np.random.default_rng(seed)
    return model, jax.tree.map(lambda s: draw.normal(size=s.shape).astype(np.float32), variables)


def rotated_pairs(rows, heads):
    """Rows in the order of neighbors, back in that of halves."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def test_tensors_are_llamas():
    """By the names and shapes of llama.cpp's 'llama', rows of queries and keys in its order."""
    model, variables = made(LLAMA | {"biases": "attention", "rope": {"kind": "llama3"}})
    found = gguf._tensors(model.config, variables["params"], "f16")
    assert len(found) == 4 + 2 * (7 + 2 + 4)
    assert found["token_embd.weight"][0].shape == (6, 32) == found["output.weight"][0].shape
    kernel = variables["params"]["block_1"]["mixer"]["qkv"]["kernel"]
    bias = variables["params"]["block_1"]["mixer"]["qkv"]["bias"]
    for name, heads, columns in (("q", 4, slice(32)), ("k", 2, slice(32, 48))):
        weight, kind = found[f"blk.1.attn_{name}.weight"]
        np.testing.assert_array_equal(rotated_pairs(weight, heads), kernel[:, columns].T)
        np.testing.assert_array_equal(
            rotated_pairs(found[f"blk.1.attn_{name}.bias"][0], heads), bias[columns]
        )
        assert kind == "F16" and not np.array_equal(weight, kernel[:, columns].T)
    np.testing.assert_array_equal(found["blk.1.attn_v.weight"][0], kernel[:, 48:].T)
    gate = variables["params"]["block_0"]["mlp"]["gate"]["kernel"]
    np.testing.assert_array_equal(found["blk.0.ffn_up.weight"][0], gate[:, 64:].T)
    assert found["blk.0.ffn_norm.weight"][1] == found["rope_freqs.weight"][1] == "F32"
    assert found["rope_freqs.weight"][0].shape == (4,)


def test_ternary_tensors_are_whole_numbers_with_a_scale():
    model, variables = made(BITNET)
    found = gguf._tensors(model.config, variables["params"], "tq2_0")
    assert "output.weight" not in found and "blk.0.ffn_sub_norm.weight" in found
    kernel = variables["params"]["block_0"]["mixer"]["query"]["kernel"]
    whole, scale = quantize_weights(kernel)
    weight, kind = found["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(weight, np.asarray(whole).T)
    assert kind == "TQ2_0" and found["blk.0.attn_q.scale"][0] == np.asarray(scale)
    plain = models.build(BITNET | {"sub_norms": False}, 6)
    found = gguf._tensors(plain.config, variables["params"], "tq2_0")  # scales inside
    np.testing.assert_allclose(
        rotated_pairs(found["blk.0.attn_q.weight"][0], 4), np.asarray(whole).T * np.asarray(scale)
    )
    assert "blk.0.attn_q.scale" not in found


def test_characters_and_bytes_are_found_by_their_bytes():
    found = gguf_tokens.fields(TOKENIZER, 8)
    assert found["model"] == "rwkv"
    assert found["tokens"] == ["\\x0a", " ", "a", "b", "\\\\", "\\xc3\\xa9"] + [
        "[UNUSED6]",
        "[UNUSED7]",
    ]
    assert found["token_type"] == [1] * 6 + [5] * 2
    every = gguf_tokens.fields(ByteTokenizer(), 256)["tokens"]
    assert every[65] == "A" and every[255] == "\\xff" and len(set(every)) == 256


def test_byte_pairs_are_gpt2s():
    tokenizer = BPETokenizer.train("banana band, banal bananas\n" * 9, 270)
    found = gguf_tokens.fields(tokenizer, 270)
    assert (found["model"], found["pre"], found["add_bos_token"]) == ("gpt2", "gpt-2", False)
    learned = tokenizer.vocab_size - 256
    assert len(found["tokens"]) == 270 and len(found["merges"]) == learned > 5
    assert all(merge.replace(" ", "") in found["tokens"] for merge in found["merges"])
    assert found["tokens"][found["eos_token_id"]] == gguf_tokens.byte_letters()[255] == "ÿ"
    letters = gguf_tokens.byte_letters()
    assert letters[32] == "Ġ" and letters[65] == "A" and len(set(letters)) == 256
    saved = tokenizer.to_json()["tokenizer"]
    end = {"id": tokenizer.vocab_size, "content": "</s>", "special": True}
    file = tokenizers.from_json(
        {
            "kind": "file",
            "tokenizer": saved
            | {
                "added_tokens": [
                    end | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                ]
            },
            "end_of_text": tokenizer.vocab_size,
        }
    )
    assert isinstance(file, FileTokenizer)
    found = gguf_tokens.fields(file, file.vocab_size + 1)
    assert found["eos_token_id"] == tokenizer.vocab_size and found["token_type"][-2:] == [3, 5]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"type": "Unigram"}}, "the model"),
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the pre-tokenizer"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "the pre-tokenizer"),
    ],
    ids=str,
)
def test_other_tokenizers_are_refused_by_name(change, said):
    saved = BPETokenizer.train("abc", 256).to_json()["tokenizer"] | change

    class Other(CharTokenizer):
        def to_json(self):
            return {"kind": "file", "tokenizer": saved}

    with pytest.raises(InputError, match=f"expected .* for {said}"):
        gguf_tokens.fields(Other("abc"), 256)
    with pytest.raises(InputError, match="at most 2 tokens"):
        gguf_tokens.fields(CharTokenizer("abc"), 2)


@pytest.mark.parametrize(
    ("options", "form", "said"),
    [
        ({"name": "gpt", "heads": 2, "width": 32, "layers": 1, "context": 8}, "f16", "GPT"),
        (LLAMA | {"activation": "relu2"}, "f16", r"model\.activation"),
        (LLAMA | {"mlp": "swiglu"}, "f16", r"model\.mlp"),
        (LLAMA | {"mixer": "gated_delta+attention"}, "f16", r"model\.mixer"),
        (LLAMA | {"rope": {"kind": "dynamic", "factor": 2.0}}, "f16", r"model\.rope\.kind"),
        (BITNET | {"rope": {"kind": "llama3"}}, "f16", r"model\.rope\.kind"),
        (BITNET | {"tie_embeddings": False}, "f16", r"model\.tie_embeddings"),
        (LLAMA, "tq2_0", "ternary weights alone"),
        (LLAMA | {"hidden": 40}, "q8_0", "hidden of 40"),
        (BITNET, "tq2_0", "width of 32"),
        (LLAMA, "q4_0", "--form"),
    ],
    ids=str,
)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(options, form, said):
    with pytest.raises(InputError, match=said):
        gguf.check(models.build(options, 6), form)


def test_a_missing_package_and_targets(tmp_path, monkeypatch):
    model, variables = made(LLAMA)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"quweit_jax\[gguf\]"):
        gguf.save(tmp_path / "m.gguf", model, variables, TOKENIZER)
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        gguf.save(tmp_path / "m.gguf", model, variables, TOKENIZER)
    with pytest.raises(InputError, match="the folder"):
        gguf.save(tmp_path, model, variables, TOKENIZER)
    with pytest.raises(InputError, match="packed"):
        gguf.save(tmp_path / "n.gguf", model, {"packed": {}}, TOKENIZER)


@pytest.mark.parametrize("form", gguf.FORMS)
def test_the_file_says_what_the_model_is(tmp_path, form):
    """Read by the package that wrote it: metadata, and every tensor to its form's rounding."""
    library = pytest.importorskip("gguf")
    sizes = {"width": 256, "hidden": 256} if form == "tq2_0" else {}
    rope = {"kind": "yarn", "factor": 4.0, "original_context": 8}
    model, variables = made(BITNET | sizes | {"rope": rope, "scan_layers": False})
    path = tmp_path / "m.gguf"
    size = gguf.save(path, model, variables, TOKENIZER, form, name="tiny")
    assert size == path.stat().st_size and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    read = library.GGUFReader(path)
    fields = {key: field.contents() for key, field in read.fields.items()}
    assert fields["general.architecture"] == "bitnet" and fields["general.name"] == "tiny"
    assert fields["bitnet.context_length"] == 24 and fields["bitnet.attention.head_count_kv"] == 2
    assert fields["bitnet.rope.scaling.type"] == "yarn"
    assert fields["bitnet.rope.scaling.original_context_length"] == 8
    assert fields["tokenizer.ggml.tokens"][2] == "a"
    expected = gguf._tensors(model.config, variables["params"], form)
    assert {tensor.name for tensor in read.tensors} == expected.keys()
    for tensor in read.tensors:
        array = expected[tensor.name][0]
        found = library.quants.dequantize(tensor.data, tensor.tensor_type).reshape(array.shape)
        exact = tensor.tensor_type.name in ("F32", "TQ2_0") or "blk" in tensor.name
        bound = 0 if exact and form != "q8_0" else np.abs(array).max() / 120
        assert np.abs(found - array).max() <= bound + 1e-7, tensor.name
