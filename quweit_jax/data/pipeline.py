"""From a source to batches: a Grain pipeline that is deterministic, index-addressed, shuffled per
epoch and shared by processes.

Dimensions: N tokens, B batch, T context.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from quweit_jax.data import documents, registry, tokenizers
from quweit_jax.data.documents import DocumentSplits, PackedDocuments
from quweit_jax.data.images import Example, ImageExamples
from quweit_jax.data.registry import DataConfig, LabelledSplits, RecallSplits
from quweit_jax.data.shards import ShardedDocuments
from quweit_jax.data.streams import StreamedDocuments
from quweit_jax.errors import InputError, needed

with needed("for data"):
    import grain

Batch = dict[str, np.ndarray]
# Enough examples to fit a thermometer on; decoding more images would only cost time.
_FIT_EXAMPLES = 4096
_FIT_BYTES = 64 << 20


class TokenWindows(Sequence):
    """A text as windows of T tokens and their successors; the last T tokens are left so that
    windows can be shifted by up to T - 1.
    """

    def __init__(self, tokens: np.ndarray, context: int, what: str = "text"):
        if len(tokens) < context + 1:
            raise InputError(
                f"data: the {what} has {len(tokens)} tokens, fewer than the context of {context} "
                "and one to predict; "
                f"use more text or --config.model.context={max(1, len(tokens) - 1)}."
            )
        self.tokens, self.context = tokens, context
        self.shifts = min(context, len(tokens) - context)

    def __len__(self) -> int:
        return (len(self.tokens) - self.shifts) // self.context

    def window(self, index: int, shift: int) -> dict[str, np.ndarray]:
        """Window `index` of those that start at `shift`: inputs (T,) and targets (T,), int32."""
        start = index * self.context + shift
        return {
            "inputs": self.tokens[start : start + self.context],
            "targets": self.tokens[start + 1 : start + 1 + self.context],
        }

    def __getitem__(self, index):  # type: ignore[override]
        return self.window(int(index), 0)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples by split, with what a model needs to know of them.

    outputs: vocabulary size or number of classes. fingerprint: of the content; a resumed run must
      find the same. validation_fingerprint: of what is validated on, where that is not part of it.
    labels: the classes' names. image_shape: (H, W, C) of images.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    outputs: int
    fingerprint: str
    tokenizer: tokenizers.Tokenizer | None = None
    labels: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] | None = None
    validation_fingerprint: str = ""

    def fit_batch(self) -> np.ndarray:
        """Inputs to initialize a model on (its thermometers are fitted to them): spread evenly over
        the training split.
        """
        count = 1 if self.tokenizer is not None else min(len(self.train), _FIT_EXAMPLES)
        if self.image_shape is not None:
            count = max(1, min(count, _FIT_BYTES // (4 * int(np.prod(self.image_shape)))))
        rows = [_example(self.train, i * len(self.train) // count) for i in range(count)]
        inputs = [row["inputs"] for row in rows if row is not None]
        # Should all of these images be left out, there is still the first that can be used.
        return np.stack(inputs or [self.train.first["inputs"]])  # type: ignore[attr-defined]


def load(
    config: DataConfig, context: int | None = None, tokenizer: tokenizers.Tokenizer | None = None
) -> Dataset:
    """Reads the source; text is cut into windows of `context` tokens, with the given tokenizer (a
    trained run's) or a new one.
    """
    splits = registry.load(config)
    if isinstance(splits, LabelledSplits):
        counts = np.asarray([len(splits.train), len(splits.validation), splits.num_classes])
        if isinstance(splits.train, ImageExamples) and isinstance(splits.validation, ImageExamples):
            fingerprint = _digest(
                counts,
                *(
                    np.frombuffer(examples.content(), np.uint8)
                    for examples in (splits.train, splits.validation)
                ),
            )
        else:
            fingerprint = _digest(counts, splits.train[0]["inputs"])
        return Dataset(
            splits.train,
            splits.validation,
            splits.num_classes,
            fingerprint,
            labels=splits.labels,
            image_shape=splits.image_shape,
        )
    if context is None:
        raise InputError(
            f"data.source: {config.source} is text, which the model of this config does not read."
        )
    if isinstance(splits, RecallSplits):
        train, validation = splits.train(context), splits.validation(context)
        fingerprint = _digest(*(train[i]["inputs"] for i in range(min(8, len(train)))))
        size = splits.tokenizer.vocab_size
        return Dataset(train, validation, size, fingerprint, splits.tokenizer)
    if isinstance(splits, DocumentSplits):
        return _documents(config, splits, context, tokenizer)
    if tokenizer is None:
        # Characters of the validation text belong to the vocabulary too, as in nanoGPT.
        corpus = splits.train + (splits.validation if config.tokenizer == "char" else "")
        tokenizer = tokenizers.train(
            config.tokenizer,
            corpus,
            bpe_vocab_size=config.bpe_vocab_size,
            path=config.tokenizer_path,
        )
    train, validation = tokenizer.encode(splits.train), tokenizer.encode(splits.validation)
    return Dataset(
        TokenWindows(train, context, "training text"),
        TokenWindows(validation, context, "validation text"),
        tokenizer.vocab_size,
        _digest(train, validation),
        tokenizer,
    )


def _documents(
    config: DataConfig, splits: DocumentSplits, context: int, tokenizer: tokenizers.Tokenizer | None
) -> Dataset:
    if config.validation_tokens < context + 1:
        raise InputError(
            f"data.validation_tokens: expected at least {context + 1} for a context of {context} "
            f"and one to predict, found {config.validation_tokens}."
        )
    if tokenizer is None:
        if config.tokenizer == "char":
            raise InputError(
                f"data.tokenizer: expected byte, bpe or file for {splits.train.place}, found char: "
                "documents that have not been read may hold "
                "characters it would not know; use --config.data.tokenizer=byte or bpe."
            )
        corpus = (
            documents.first_text(splits.train, config.limit_bytes)
            if config.tokenizer == "bpe"
            else ""
        )
        tokenizer = tokenizers.train(
            config.tokenizer,
            corpus,
            bpe_vocab_size=config.bpe_vocab_size,
            path=config.tokenizer_path,
        )
    held_out, count = documents.held_out(
        splits, tokenizer, config.validation_tokens, config.validation_fraction
    )
    if isinstance(splits.train, ShardedDocuments):
        source = splits.train.part(slice(count))
        train = StreamedDocuments(source, tokenizer, context, config.threads)
    else:
        train = PackedDocuments(splits.train, tokenizer, context, count, config.threads)
    validation = TokenWindows(
        held_out, context, f"validation text ({(splits.validation or splits.train).place})"
    )
    return Dataset(
        train,
        validation,
        tokenizer.vocab_size,
        _digest(np.frombuffer(train.content(), np.uint8)),
        tokenizer,
        validation_fingerprint=_digest(held_out),
    )


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _example(examples: Sequence[Example], index: int) -> dict[str, np.ndarray] | None:
    """An example as it is evaluated; None for an image that is left out (data.skip_bad)."""
    return examples.get(index) if isinstance(examples, ImageExamples) else examples[index]


def left_out(examples: Sequence[Any]) -> dict[int, str]:
    """Why images were left out so far, by index: '{place}: {reason}'; {} without data.skip_bad, and
    for other examples.
    """
    # Without skip_bad an image may be found bad that was only read ahead: none is left out then.
    if not isinstance(examples, ImageExamples) or not examples.config.skip_bad:
        return {}
    return {i: f"{examples.source.describe(i)}: {why}" for i, why in examples.bad.items()}


def train_batches(
    examples: Sequence[Example],
    batch_size: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """An endless iterator of this process's share of each global batch; `get_state` and `set_state`
    move it to any batch.

    An epoch visits every example once, in an order drawn from (seed, epoch); token windows are also
    shifted per epoch, so that another epoch cuts the text elsewhere; images are varied anew each
    time, by draws from (seed, place in the stream). All processes together see the same global
    batches whatever their number. The state is fit for JSON; see `join_states` for that of several.
    """
    if batch_size % process_count:
        raise InputError(
            f"batch_size: {batch_size} cannot be shared equally by {process_count} processes; use "
            "a multiple."
        )
    if not len(examples):
        raise InputError("data: the training split is empty.")
    if isinstance(examples, PackedDocuments | StreamedDocuments):
        return examples.batches(batch_size, seed, process_index, process_count, prefetch)
    number = len(examples)

    def read(index: int, example: int) -> dict[str, np.ndarray]:
        if isinstance(examples, TokenWindows):
            epoch = index // number
            shift = (
                int(np.random.default_rng((seed, epoch)).integers(examples.shifts)) if epoch else 0
            )
            return examples.window(int(example), shift)
        if isinstance(examples, ImageExamples):
            return examples.augmented(int(example), np.random.default_rng((seed, index)))
        return examples[int(example)]

    data = grain.MapDataset.range(number).seed(seed).shuffle().repeat().map_with_index(read)
    data = data.slice(slice(process_index, None, process_count)).batch(
        batch_size // process_count, drop_remainder=True
    )
    threads = _threads(examples) if prefetch else 0
    # Each thread makes whole batches, which Grain hands on in their order; fewer places than
    # threads would leave some idle.
    return iter(
        data.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
        )
    )


def join_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state out of those of all processes after the same batch; it can be set in each of any
    number of processes.

    Streams of documents have a place for each row of the batch, and a process knows its own rows';
    all other states are alike.
    """
    rows = {row: place for state in states for row, place in state.get("rows", {}).items()}
    return {"rows": rows} if rows else states[0]


def _threads(examples: Sequence[Example]) -> int:
    return examples.config.threads if isinstance(examples, ImageExamples) else 1


def eval_batches(
    examples: Sequence[Example],
    batch_size: int,
    limit: int = 0,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """A fixed set of batches, spread evenly over the split (`limit` batches; 0: the whole split),
    each with `weights` (B,).

    The last batch is filled up with examples of weight 0, so every batch has the same shape; images
    that are left out weigh 0 too.
    """
    count = min(len(examples), limit * batch_size) if limit else len(examples)
    chosen = [i * len(examples) // count for i in range(count)]
    local = batch_size // process_count
    threads = _threads(examples)
    with ThreadPoolExecutor(threads) as pool:
        each: Any = pool.map if threads > 1 else map
        for start in range(0, count, batch_size):
            places = range(start + process_index * local, start + (process_index + 1) * local)
            found = list(each(lambda p: _example(examples, chosen[min(p, count - 1)]), places))
            rows = [examples.blank() if row is None else row for row in found]  # type: ignore[attr-defined]
            batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
            yield batch | {
                "weights": np.asarray(
                    [p < count and row is not None for p, row in zip(places, found)], np.float32
                )
            }
