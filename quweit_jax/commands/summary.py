"""What a training command says: before it starts, and when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from quweit_jax import config as configs
from quweit_jax.data import pipeline
from quweit_jax.deploy import generate as generation
from quweit_jax.deploy.pack import describe, describe_lines, packed_or_trained
from quweit_jax.training.loop import Result


def announce(config: configs.Config, workdir: Path) -> None:
    """One line on what is about to happen."""
    if jax.process_index() == 0:
        mlp = f", mlp {config.model.mlp}" if "mlp" in config.model else ""
        mlp += ", integer-only" if config.model.get("integer") else ""
        name = (
            config.data.name
            if config.data.source == "tfds"
            else config.data.path or config.data.source
        )
        print(
            f"training {config.model.name}{mlp} on {name}: {config.steps} steps of "
            f"{config.batch_size}, {jax.device_count()} {jax.default_backend()} device(s), into "
            f"{workdir}",
            flush=True,
        )


def summarize(result: Result, workdir: Path) -> None:
    """Validation loss, a sample, the plot and the line that goes on."""
    if jax.process_index():
        return
    resume = f"python -m quweit_jax.train --workdir={workdir}"
    if not result.complete:
        print(
            f"stopped at step {result.step} of {result.parts.config.steps}, saved. To go on: "
            f"{resume}"
        )
        return
    if result.validation is not None:
        accuracy = (
            f", accuracy {result.validation['accuracy']:.2%}"
            if result.parts.dataset.tokenizer is None
            else ""
        )
        print(f"step {result.step}: validation loss {result.validation['loss']:.4f}{accuracy}")
    for name, examples in (
        ("training", result.parts.dataset.train),
        ("validation", result.parts.dataset.validation),
    ):
        if bad := pipeline.left_out(examples):
            index, reason = min(bad.items())
            print(
                f"left out: {len(bad)} {name} image(s) that cannot be used, such as index {index} "
                f"({reason})"
            )
    if jax.process_count() > 1:
        # the parameters are spread over processes; the commands below read them from the checkpoint
        return
    config, variables = result.parts.config, jax.device_get(result.state.variables())
    model, inputs = result.parts.model, result.parts.init_inputs
    packed = packed_or_trained(model, variables, inputs)
    if "packed" in packed:
        print("\n".join(describe_lines(describe(model, packed, inputs))))
    print(f"loss curve: {workdir / 'plots' / 'loss.png'}")
    if result.parts.dataset.tokenizer is not None and config.sample_tokens:
        print(f"sample:\n{'-' * 72}\n{sample(result, variables)}\n{'-' * 72}")
        print(
            f"more text: python -m quweit_jax.generate --workdir={workdir}   longer training: "
            f"{resume} --config.steps={2 * result.step}"
        )
    else:
        print(f"longer training: {resume} --config.steps={2 * result.step}")


def sample(result: Result, variables: Any) -> str:
    """A text of `config.sample_tokens` tokens after the beginning of the validation text."""
    parts = result.parts
    assert parts.dataset.tokenizer is not None
    prompt = np.asarray(parts.dataset.validation[0]["inputs"][:16])
    tokens = generation.generate_tokens(
        parts.model,
        variables,
        prompt,
        parts.config.sample_tokens,
        temperature=0.8,
        seed=parts.config.seed,
    )
    return parts.dataset.tokenizer.decode(prompt) + "".join(
        generation.stream_text(parts.dataset.tokenizer, tokens, prompt)
    )
