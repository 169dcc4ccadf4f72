"""What a report shows of a trained model itself: text it writes, images it classifies, and what its
look-up tables learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from quweit_jax import config as configs
from quweit_jax.data import pipeline
from quweit_jax.data.images import NORMALIZATIONS
from quweit_jax.deploy import generate as generation
from quweit_jax.deploy import packed
from quweit_jax.deploy import prune as pruning
from quweit_jax.deploy import tables as deployed
from quweit_jax.errors import InputError, RunError
from quweit_jax.report import insight
from quweit_jax.report.summary import ClassifiedImage, Record
from quweit_jax.training import run

_IMAGES = 8
_TOKENS = 200
_PROMPT = 16


def look(record: Record, overrides: Mapping[str, str], batches: int) -> dict[str, Any]:
    """Opens the run's best checkpoint and adds to the record what it shows; tells 'outputs' and
    'image_size' where they are known.

    A data set that isn't there is never fetched. Of a language model without its data there is
    still text.

    Raises:
      Exception: whatever goes wrong in opening it; see `explain`.
    """
    path, keys = Path(record.path), configs.flat(record.config)
    if not run.has_checkpoints(path):
        record.notes.append("no checkpoint yet, so there is no model to look at")
        return {}
    given = {
        key: value for key, value in {"data.download": "False", **overrides}.items() if key in keys
    }
    try:
        opened, missing = run.open_run(path, None, given), ""
    except InputError as error:
        if not record.language:
            raise
        missing = str(error)
        opened = run.open_run(path, None, given, data=False)
    if missing:
        record.notes.append(f"without its data ({missing})")
    parts = opened.parts
    _try(record, "tables", lambda: _tables(record, opened, batches, missing))
    if parts.tokenizer is not None:
        _try(record, "text", lambda: _text(record, opened))
        return {"outputs": parts.tokenizer.vocab_size}
    _try(record, "images", lambda: _images(record, opened))
    shape = parts.dataset.image_shape or (
        round(len(np.ravel(parts.dataset.validation[0]["inputs"])) ** 0.5),
    )
    return {"outputs": parts.dataset.outputs, "image_size": shape[0]}


def explain(error: Exception, record: Record) -> tuple[str, str]:
    """A state and a reason for a run that could not be opened; a run without its data keeps its
    state.
    """
    text = str(error).split("\n")[0]
    if isinstance(error, RunError):
        return "damaged", text
    if isinstance(error, InputError):
        if "checkpoint of step" in text or text.startswith(("model", "optimizer", "mesh")):
            return "older version", f"this version cannot open it: {text}"
        record.notes.append(
            f"the model was not opened, so there are no samples and no look-up tables: {text}"
        )
        return record.state, ""
    if isinstance(error, AttributeError | KeyError) and record.config:
        return "older version", f"this version cannot open it ({type(error).__name__}: {text})"
    return "damaged", f"it could not be opened ({type(error).__name__}: {text})"


def _try(record: Record, what: str, action: Any) -> None:
    try:
        action()
    except Exception as error:  # one part that fails leaves the others
        record.notes.append(
            f"no {what} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})"
        )


def _text(record: Record, opened: run.OpenRun) -> None:
    parts, tokenizer = opened.parts, opened.parts.tokenizer
    assert tokenizer is not None
    if parts.data is not None:
        prompt = np.asarray(parts.data.validation[0]["inputs"][:_PROMPT])
    else:
        prompt = np.asarray(tokenizer.encode("\n"), np.int32)
        prompt = prompt if len(prompt) else np.zeros(1, np.int32)
    tokens = generation.generate_tokens(
        parts.model, _packed(opened), prompt, _TOKENS, temperature=0.8, seed=parts.config.seed
    )
    record.text = (
        tokenizer.decode(prompt),
        "".join(generation.stream_text(tokenizer, tokens, prompt)),
    )


def _packed(opened: run.OpenRun) -> Any:
    """The variables as deployed, where there is something to pack."""
    try:
        return packed.pack(jax.device_get(opened.variables))
    except InputError:
        return opened.variables


def _images(record: Record, opened: run.OpenRun) -> None:
    data = opened.parts.dataset
    places = [i * len(data.validation) // _IMAGES for i in range(_IMAGES)]
    examples = [example for i in places if (example := _example(data.validation, i)) is not None]
    inputs = np.stack([example["inputs"] for example in examples])
    probabilities = np.asarray(
        jax.nn.softmax(jax.jit(opened.parts.model.apply)(opened.variables, inputs))
    )
    names = data.labels or tuple(map(str, range(data.outputs)))
    for example, each in zip(examples, probabilities):
        pixels = _pixels(np.asarray(example["inputs"]), opened.parts.data_config.normalize)
        if pixels is not None:
            found = ClassifiedImage(
                pixels, names[int(example["targets"])], names[int(each.argmax())], float(each.max())
            )
            record.images.append(found)


def _example(examples: Any, index: int) -> dict[str, Any] | None:
    """An example, or None for an image that is left out (data.skip_bad)."""
    return examples.get(index) if hasattr(examples, "get") else examples[index]


def _pixels(inputs: np.ndarray, normalize: str) -> np.ndarray | None:
    """What an input looks like, uint8: (H, W, C), or a square of numbers (H, W); None for what is
    no picture.
    """
    if inputs.ndim == 3:
        mean, deviation = (np.asarray(v, np.float32) for v in NORMALIZATIONS[normalize])
        pixels = np.clip(np.round(255 * (inputs * deviation + mean)), 0, 255).astype(np.uint8)
        return pixels[..., 0] if pixels.shape[2] == 1 else pixels
    side = round(inputs.size**0.5)
    if side * side != inputs.size:
        return None
    low, high = inputs.min(), inputs.max()
    return (
        np.round(255 * (inputs - low) / max(high - low, 1e-9)).astype(np.uint8).reshape(side, side)
    )


def _tables(record: Record, opened: run.OpenRun, batches: int, missing: str) -> None:
    parts = opened.parts
    shape = np.shape(parts.data.validation[0]["inputs"]) if parts.data is not None else ()
    form = deployed.deploy(parts.model, opened.variables, shape)
    if form is None:
        return
    counts: dict[str, pruning.Counts] = {}
    folds: dict[str, deployed.Fold] = {}
    compared = None
    if parts.data is not None:
        size = run.eval_batch_size(parts.config, parts.mesh)
        data = [
            (b["inputs"], b["weights"])
            for b in pipeline.eval_batches(parts.data.validation, size, batches)
        ]
        counts = pruning.count_ones(form, data)
        pruned, folds = pruning.prune(form, counts)
        result = pruning.compare(form, pruned, data)
        tables = sum(len(layer) for block in form.blocks.values() for layer in block.tables)
        kept = sum(int(layer.sum()) for left in folds.values() for layer in left.kept)
        compared = insight.Pruned(
            result.outputs, result.same_decisions, result.same_logits, tables, tables - kept
        )
    layers = []
    for name, block in form.blocks.items():
        for i, (tables, wiring) in enumerate(zip(block.tables, block.wiring)):
            inputs = len(block.tables[i - 1]) if i else block.num_inputs
            layers.append(
                insight.LayerInsight(
                    block=name,
                    layer=i,
                    lut_inputs=wiring.shape[1],
                    kinds=insight.count_kinds(tables, wiring),
                    reads=insight.count_reads(wiring, inputs),
                    influence=insight.influences(tables, wiring, inputs),
                    thresholds=0 if i else block.thresholds,
                    balance=counts[name].ones[i] / max(1, counts[name].tokens)
                    if name in counts
                    else None,
                    kept=int(folds[name].kept[i].sum()) if name in folds else None,
                )
            )
    record.insight = insight.Insight(
        tuple(layers),
        compared,
        "" if compared else f"tables were not watched at work: {missing or 'no data'}",
    )
