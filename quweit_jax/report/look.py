"""What a report shows of a trained model itself: text it writes, images it classifies, and what its
look-up tables learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from quweit_jax.config import flat
from quweit_jax.data import pipeline
from quweit_jax.data.images import NORMALIZATIONS
from quweit_jax.deploy import prune, tables
from quweit_jax.deploy.generate import generate_tokens, stream_text
from quweit_jax.deploy.pack import packed_or_trained
from quweit_jax.errors import InputError, RunError, first_line
from quweit_jax.report import insight
from quweit_jax.report.summary import ClassifiedImage, Json, RunSummary
from quweit_jax.training import rundir

_IMAGES = 8
_TOKENS = 200
_PROMPT = 16


def look(summary: RunSummary, overrides: Mapping[str, str], batches: int, training: bool) -> Json:
    """Opens the run's best checkpoint and adds to the summary what it shows, or why it shows
    nothing.

    A data set that isn't there is never fetched. A language model without its data still writes.
    batches: of validation data on which tables are watched. training: the run is being trained now.

    Returns:
      'outputs' and 'image_size', where they are known.
    """
    try:
        return _look(summary, overrides, batches)
    except Exception as error:  # a report of many runs does not stop for one
        _explain(error, summary, training)
        return {}


def _look(summary: RunSummary, overrides: Mapping[str, str], batches: int) -> Json:
    path, keys = Path(summary.path), flat(summary.config)
    if not rundir.has_checkpoints(path):
        summary.notes.append("no checkpoint yet, so there is no model to look at")
        return {}
    wanted = {"data.download": "False", **overrides}
    given = {key: value for key, value in wanted.items() if key in keys}
    missing = ""
    try:
        opened = rundir.open_run(path, None, given)
    except InputError as error:
        if not summary.language:
            raise
        missing = str(error)
        opened = rundir.open_run(path, None, given, data=False)
        summary.notes.append(f"without its data ({missing})")
    for sentence in opened.damaged:
        summary.mark("damaged", f"{sentence}; what is shown is of step {opened.step}")
    if opened.data_changed:
        summary.notes.append(opened.data_changed)
    return look_at(summary, opened, batches, missing)


def look_at(
    summary: RunSummary,
    opened: rundir.OpenRun,
    batches: int,
    missing: str = "",
    inputs: np.ndarray | None = None,
) -> Json:
    """The same of what is opened already.

    missing: why it has no data. inputs: of the model, where the setup has no example.
    """

    def of_model() -> np.ndarray:
        return opened.setup.init_inputs if inputs is None else inputs

    _try(summary, "tables", lambda: _tables(summary, opened, of_model(), batches, missing))
    if opened.setup.tokenizer is not None:
        _try(summary, "text", lambda: _text(summary, opened, of_model()))
        return {"outputs": opened.setup.tokenizer.vocab_size}
    data = opened.setup.data
    if len(data.validation):
        _try(summary, "images", lambda: _images(summary, opened))
    if data.image_shape is not None:
        side, _, channels = data.image_shape
        return {"outputs": data.outputs, "image_size": side, "channels": channels}
    example = data.validation[0]["inputs"] if len(data.validation) else of_model()
    size = round(np.size(example) ** 0.5)
    return {"outputs": data.outputs, "image_size": size}


def _explain(error: Exception, summary: RunSummary, training: bool) -> None:
    """Says why a run could not be opened; one without its data keeps its state."""
    text = first_line(error, longest=None)  # ours end with what to do
    named = f"{type(error).__name__}: {text}"
    if isinstance(error, RunError):
        state, reason = "damaged", text
    elif isinstance(error, InputError):
        ours = text.startswith(("model", "optimizer", "mesh: unknown")) or "config of a run" in text
        ours = ours and "on a CPU" not in text
        if "checkpoint of step" not in text and not ours:  # the data's fault, or the machine's
            summary.notes.append(
                f"the model was not opened, so there are no samples and no look-up tables: {text}"
            )
            return
        state, reason = "older version", f"this version cannot open it: {text}"
    elif isinstance(error, AttributeError | KeyError):
        state, reason = "older version", f"this version cannot open it ({named})"
    else:
        state, reason = "damaged", f"it could not be opened ({named})"
    if training and state == "damaged":  # its checkpoints come and go
        summary.notes.append(f"the model was not opened while the run is being trained ({reason})")
    else:
        summary.mark(state, reason)


def _try(summary: RunSummary, what: str, action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:  # one part that fails leaves the others
        summary.notes.append(f"no {what} ({type(error).__name__}: {first_line(error)})")


def _text(summary: RunSummary, opened: rundir.OpenRun, inputs: np.ndarray) -> None:
    setup, tokenizer = opened.setup, opened.setup.tokenizer
    assert tokenizer is not None
    if len(setup.data.validation):
        prompt = np.asarray(setup.data.validation[0]["inputs"][:_PROMPT])
    else:
        prompt = np.asarray(tokenizer.encode("\n"), np.int32)
        prompt = prompt if len(prompt) else np.zeros(1, np.int32)
    tokens = generate_tokens(
        setup.model,
        opened.variables
        if "packed" in opened.variables
        else packed_or_trained(setup.model, opened.variables, inputs),
        prompt,
        _TOKENS,
        seed=setup.config.seed,
    )
    written = "".join(stream_text(tokenizer, tokens, prompt))
    summary.text = (tokenizer.decode(prompt), written)


def _images(summary: RunSummary, opened: rundir.OpenRun) -> None:
    setup, data = opened.setup, opened.setup.data
    (batch,) = pipeline.eval_batches(data.validation, _IMAGES, 1)
    logits = jax.jit(setup.model.apply)(opened.variables, batch["inputs"])
    probabilities = np.asarray(jax.nn.softmax(logits))
    names = data.labels or tuple(map(str, range(data.outputs)))
    for i in np.flatnonzero(batch["weights"]):
        pixels = _pixels(batch["inputs"][i], setup.data_config.normalize)
        if pixels is not None:
            expected, found = int(batch["targets"][i]), int(probabilities[i].argmax())
            share = float(probabilities[i].max())
            summary.images.append(ClassifiedImage(pixels, names[expected], names[found], share))


def _pixels(inputs: np.ndarray, normalize: str) -> np.ndarray | None:
    """An input as uint8 pixels: (H, W, C), or a square of numbers (H, W); None if it is neither."""
    if inputs.ndim == 3:
        mean, deviation = (np.asarray(v, np.float32) for v in NORMALIZATIONS[normalize])
        pixels = np.clip(np.round(255 * (inputs * deviation + mean)), 0, 255).astype(np.uint8)
        return pixels[..., 0] if pixels.shape[2] == 1 else pixels
    side = round(inputs.size**0.5)
    if side * side != inputs.size:
        return None
    low, high = inputs.min(), inputs.max()
    scaled = 255 * (inputs - low) / max(high - low, 1e-9)
    return np.round(scaled).astype(np.uint8).reshape(side, side)


def _tables(
    summary: RunSummary, opened: rundir.OpenRun, inputs: np.ndarray, batches: int, missing: str
) -> None:
    setup, data = opened.setup, opened.setup.data
    form = prune.deploy(setup.model, opened.variables, inputs)
    if form is None:
        return
    counts: dict[str, prune.Counts] = {}
    folds: dict[str, prune.Fold] = {}
    compared, note = None, f"tables were not watched at work: {missing or 'no data'}"
    if len(data.validation):
        size = setup.eval_batch_size
        found = pipeline.eval_batches(data.validation, size, batches)
        watched = [(batch["inputs"], batch["weights"]) for batch in found]
        counts = prune.count_ones(form, watched)
        pruned, folds = prune.prune(form, counts)
        result = prune.compare(form, pruned, watched)
        total = sum(len(layer) for block in form.blocks.values() for layer in block.tables)
        kept = sum(int(layer.sum()) for left in folds.values() for layer in left.kept)
        same = result.same_decisions, result.same_logits
        compared, note = insight.Pruned(result.outputs, *same, total, total - kept), ""
    layers = tuple(
        _layer(name, i, block, counts.get(name), folds.get(name))
        for name, block in form.blocks.items()
        for i in range(len(block.tables))
    )
    summary.insight = insight.Insight(layers, compared, note)


def _layer(
    name: str, i: int, block: tables.Block, counts: prune.Counts | None, left: prune.Fold | None
) -> insight.LayerInsight:
    luts, wiring = block.tables[i], block.wiring[i]
    inputs = len(block.tables[i - 1]) if i else block.num_inputs
    return insight.LayerInsight(
        block=name,
        layer=i,
        lut_inputs=wiring.shape[1],
        kinds=insight.count_kinds(luts, wiring),
        reads=insight.count_reads(wiring, inputs),
        influence=insight.influences(luts, wiring, inputs),
        thresholds=0 if i else block.thresholds,
        balance=counts.ones[i] / max(1, counts.tokens) if counts else None,
        kept=int(left.kept[i].sum()) if left else None,
    )
