"""Tokenizers as GGUF describes them, so that llama.cpp spells texts as the model was trained to.

Characters and bytes are written as its 'rwkv' (the longest token that fits, of any bytes),
byte-level byte pairs as its 'gpt2'.
"""

from __future__ import annotations

from typing import Any

from quweit_jax.data.tokenizers import Tokenizer
from quweit_jax.errors import InputError

_NORMAL, _CONTROL, _UNUSED = 1, 3, 5
_GPT2_BYTES = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
]  # bytes that stand for themselves
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a text is cut into words, by the expression that does it, as llama.cpp names it.
_PRE = {
    rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_SPACES}": "llama-bpe",
    rf"{_CONTRACTIONS}\p{{N}}{_SPACES}": "qwen2",
}


def fields(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The entries of 'tokenizer.ggml' by name. vocab_size: of the model; ids that the tokenizer has
    not are written as unused tokens.

    Raises:
      InputError: llama.cpp has no tokenizer that does the same, or the model has fewer tokens.
    """
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"gguf: expected a tokenizer of at most {vocab_size} tokens, as the model has, found "
            f"{tokenizer.vocab_size}; give the tokenizer it was trained with."
        )
    saved = tokenizer.to_json()
    if saved["kind"] in ("char", "byte"):
        pieces = saved.get("vocabulary") or [bytes([i]) for i in range(256)]
        tokens = [_escaped(p if isinstance(p, bytes) else p.encode("utf-8")) for p in pieces]
        return {"model": "rwkv", **_listed(tokens, [_NORMAL] * len(tokens), vocab_size)}
    return _byte_pairs(saved["tokenizer"], tokenizer.end_of_text, vocab_size)


def _listed(tokens: list[str], kinds: list[int], vocab_size: int) -> dict[str, Any]:
    spare = range(len(tokens), vocab_size)
    return {
        "tokens": [*tokens, *(f"[UNUSED{i}]" for i in spare)],
        "token_type": [*kinds, *(_UNUSED for _ in spare)],
    }


def _escaped(piece: bytes) -> str:
    """Bytes as 'rwkv' writes them: what is no printable ASCII as \\xff."""
    return "".join(
        f"\\{chr(b)}" if b == 92 else chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in piece
    )


def byte_letters() -> list[str]:
    """The letter by which byte-level byte pairs write each of the 256 bytes (GPT-2's)."""
    others = (b for b in range(256) if b not in _GPT2_BYTES)
    places = {b: 256 + i for i, b in enumerate(others)}
    return [chr(places.get(b, b)) for b in range(256)]


def _byte_pairs(saved: dict[str, Any], end: int | None, vocab_size: int) -> dict[str, Any]:
    model = saved.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise _unlike("the model", "BPE on bytes", model.get("type"))
    pre = _pre_tokenizer(saved.get("pre_tokenizer") or {})
    if saved.get("normalizer") is not None:
        raise _unlike("the normalizer", "none", saved["normalizer"].get("type"))
    names = {i: piece for piece, i in model["vocab"].items()}
    added = {token["id"]: token for token in saved.get("added_tokens") or []}
    names |= {i: token["content"] for i, token in added.items()}
    count = 1 + max(names)
    tokens = [names.get(i, f"[UNUSED{i}]") for i in range(count)]
    kinds = [_NORMAL if i in names else _UNUSED for i in range(count)]
    for i, token in added.items():
        kinds[i] = _CONTROL if token.get("special") else 4  # user-defined
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "model": "gpt2",
        "pre": pre,
        **_listed(tokens, kinds, vocab_size),
        "merges": merges,
        "add_bos_token": False,
        "add_eos_token": False,
        **_ends(tokens, end),
    }


def _ends(tokens: list[str], end: int | None) -> dict[str, int]:
    """The tokens that begin and end a text. A 'gpt2' tokenizer always has them; where ours has none
    they are a byte that no UTF-8 holds, which such a model never says.
    """
    if end is None:
        never = byte_letters()[0xFF]
        if never not in tokens:
            raise _unlike("the end of text", "a token of that meaning", None)
        end = tokens.index(never)
    return {"bos_token_id": int(end), "eos_token_id": int(end)}


def _pre_tokenizer(saved: dict[str, Any]) -> str:
    """llama.cpp's name of what cuts a text into words."""
    parts = saved["pretokenizers"] if saved.get("type") == "Sequence" else [saved]
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    if len(levels) != 1 or levels[0].get("add_prefix_space"):
        raise _unlike("the pre-tokenizer", "ByteLevel without add_prefix_space", saved)
    if len(parts) == 1 and levels[0].get("use_regex", True):
        return "gpt-2"
    cuts = [part.get("pattern", {}).get("Regex") for part in parts if part not in levels]
    if len(cuts) != 1 or cuts[0] not in _PRE or levels[0].get("use_regex", True):
        raise _unlike("the pre-tokenizer", "that of GPT-2, Llama 3 or Qwen2", saved)
    return _PRE[cuts[0]]


def _unlike(what: str, expected: str, found: object) -> InputError:
    return InputError(
        f"gguf: tokenizer: expected {expected} for {what}, found {str(found)[:200]}; llama.cpp has "
        "no other that is known here."
    )
