"""Has a real llama.cpp run what `export --to=gguf` writes, and compares it with the model here:

    python benchmarks/run_gguf.py --workdir=runs/x --text=FILE [--forms=f16,q8_0]

It needs the packages gguf and xllamacpp (llama.cpp's own server, on this machine's loopback). For
each form: how many tokens of a text it spells as ours, whether its greedy continuation of 64 tokens
is ours, and at each position of a text whether the next token is ours and how far the logits lie
apart, as a share of their range. llama.cpp tells logarithms of probabilities: both are compared
less their mean.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import urllib.request
from pathlib import Path

import jax
import numpy as np

from quweit_jax.deploy import generate, gguf
from quweit_jax.deploy.pack import packed_or_trained
from quweit_jax.training import rundir

GREEDY = 64


class LlamaCpp:
    """A file in a real llama.cpp, on one thread."""

    def __init__(self, path: Path, context: int, vocab: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.verbosity = False, -1
        self.server, self.vocab = xllamacpp.Server(params), vocab
        self.version = f"xllamacpp {xllamacpp.__version__}"

    def spell(self, text: str) -> list[int]:
        """Its tokens of a text."""
        found = self._ask("/tokenize", {"content": text, "add_special": False})
        return [int(token) for token in found["tokens"]]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Its continuation by the likeliest tokens."""
        asked = {"n_predict": count, "temperature": 0.0, "top_k": 1, "return_tokens": True}
        return list(self._ask("/completion", {"prompt": prompt, **asked})["tokens"])

    def log_probabilities(self, prompt: list[int]) -> np.ndarray:
        """Of the next token, (V,)."""
        asked = {"n_predict": 1, "temperature": 0.0, "n_probs": self.vocab}
        answer = self._ask("/completion", {"prompt": prompt, **asked})
        found = np.full(self.vocab, np.nan)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def _ask(self, path: str, request: dict) -> dict:
        data = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self.server.listening_address}{path}", data, headers)
        with urllib.request.urlopen(asked, timeout=600) as answer:
            return json.load(answer)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--forms", default="f16,q8_0")
    parser.add_argument("--positions", type=int, default=100)
    args = parser.parse_args()
    run = rundir.open_run(Path(args.workdir), None, {}, data=False)
    model, tokenizer = run.setup.model, run.setup.tokenizer
    assert tokenizer is not None
    context = model.config.context
    deployed = packed_or_trained(model, run.variables, run.setup.init_inputs)
    text = Path(args.text).read_text(encoding="utf-8")
    tokens = np.asarray(tokenizer.encode(text))[: args.positions]
    prompt = [int(t) for t in tokens[: context - GREEDY]] if context > GREEDY else [int(tokens[0])]
    ours = list(
        generate.generate_tokens(model, deployed, np.asarray(prompt), GREEDY, temperature=0.0)
    )
    apply = jax.jit(model.apply)
    with tempfile.TemporaryDirectory() as folder:
        for form in args.forms.split(","):
            path = Path(folder) / f"{form}.gguf"
            size = gguf.save(path, model, run.variables, tokenizer, form)
            theirs = LlamaCpp(path, max(256, context), tokenizer.vocab_size)
            print(f"{form}: {size:,} bytes, {theirs.version}", flush=True)
            start = text[:2000]
            spelled = [int(t) for t in tokenizer.encode(start)]
            print(f"  spells {len(start)} characters as ours: {theirs.spell(start) == spelled}")
            found = theirs.greedy(prompt, GREEDY)
            same = next((i for i, (a, b) in enumerate(zip(found, ours)) if a != b), len(found))
            distinct = f"{len(set(ours))} different ones among them"
            print(f"  greedy tokens equal to ours: {same} of {len(ours)}, {distinct}", flush=True)
            apart, agreed, count = [], 0, 0
            for end in range(1, len(tokens) + 1):
                seen = tokens[max(0, end - context) : end]
                padded = np.zeros((1, context), np.int32)
                padded[0, : len(seen)] = seen
                here = np.asarray(apply(deployed, padded))[0, len(seen) - 1]
                there = theirs.log_probabilities([int(t) for t in seen])
                known = np.isfinite(there)
                here, there = here[known] - here[known].mean(), there[known] - there[known].mean()
                apart.append(np.abs(here - there).max() / np.ptp(here))
                agreed, count = agreed + int(here.argmax() == there.argmax()), count + 1
            print(
                f"  {count} positions: next token equal at {agreed}, logits apart by "
                f"{max(apart):.2e} of their range at most, {np.mean(apart):.2e} on average",
                flush=True,
            )


if __name__ == "__main__":
    main()
