"""Sets of many documents as endless streams of tokens cut into windows; no document is read before
it is needed.

A stream is: separator, document, separator, document, ... The separator is the tokenizer's end of
text or else a line end, so that each document ends with it and the next one is begun from it.
Windows lie end to end and the targets are the stream one token later: every token of the stream is
a target once.

Each row of the global batch reads a stream of its own: row r of B takes the documents r, r + B, r +
2 B, ... of the drawn order. A long document therefore fills one row of many batches, not many rows
of one; and any number of processes, each reading the documents of its own rows, make the same
global batches and go on from the same state.

Dimensions: N documents, B rows of the global batch, T context.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from quweit_jax.data.shards import ShardedDocuments
from quweit_jax.data.tokenizers import Tokenizer
from quweit_jax.errors import InputError, needed

with needed("for data"):
    import grain

VALIDATION_FOLDERS = ("validation", "val", "test")
# What a tokenizer is trained on where data.limit_bytes sets no limit; more text hardly changes its
# pieces.
_TOKENIZER_BYTES = 20_000_000
FINGERPRINTED = 4  # documents

Window = dict[str, np.ndarray]


class DocumentSource(Protocol):
    """A source of documents, read by index."""

    place: str  # data set and split, for messages

    def __len__(self) -> int:
        """How many."""
        ...

    def read(self, index: int) -> str:
        """A document's text."""
        ...

    def identity(self) -> str:
        """A text that differs for other documents, as far as can be told without reading them."""
        ...


@dataclasses.dataclass(frozen=True)
class DocumentSplits:
    """Documents to train on and to validate on; without the latter, the last ones of the former are
    held out.
    """

    train: DocumentSource | ShardedDocuments
    validation: DocumentSource | ShardedDocuments | None


def texts(source: DocumentSource | ShardedDocuments) -> Iterator[str]:
    """All documents, in their order."""
    if isinstance(source, ShardedDocuments):
        return source.texts()
    return (source.read(index) for index in range(len(source)))


def first_text(source: DocumentSource | ShardedDocuments, limit_bytes: int) -> str:
    """The first documents, a line end between them, up to `limit_bytes` bytes (0: 20 MB); to train
    a tokenizer on.
    """
    pieces, left = [], limit_bytes or _TOKENIZER_BYTES
    for text in texts(source):
        pieces.append(text.encode("utf-8")[:left].decode("utf-8", errors="ignore"))
        left -= len(pieces[-1].encode("utf-8")) + 1
        if left <= 0:
            break
    return "\n".join(pieces)


def separator(tokenizer: Tokenizer) -> np.ndarray:
    """What stands between documents, at least one token: the end of text, or the tokens of a line
    end.
    """
    tokens = (
        np.asarray([tokenizer.end_of_text], np.int32)
        if tokenizer.end_of_text is not None
        else tokenizer.encode("\n")
    )
    if not len(tokens):
        raise InputError(
            "data.tokenizer: expected an end-of-text token or one for line ends, to part documents "
            "with; found neither. "
            "Name the eos_token in tokenizer_config.json beside tokenizer.json, or use another "
            "tokenizer."
        )
    return tokens


def held_out(
    splits: DocumentSplits, tokenizer: Tokenizer, limit: int, fraction: float
) -> tuple[np.ndarray, int]:
    """Encodes what to validate on: (`limit` tokens, or all there are; the number of documents, or
    of files that are read from their beginning, left to train on).

    Without a validation split these are the documents at the end of the training split, from the
    last one back, until they hold `limit` tokens or are the `fraction` of all; of files, the last.
    """
    number, source = (
        len(splits.train),
        splits.train if splits.validation is None else splits.validation,
    )
    if isinstance(source, ShardedDocuments):
        return _held_out_file(source, tokenizer, limit, splits.validation is None, number)
    order = range(len(source))
    if splits.validation is None:
        if number < 2:
            raise InputError(
                f"data: expected two or more documents in {source.place}, which has no validation "
                f"split, found {number}; add some."
            )
        order = order[: -1 - max(1, int(number * fraction)) : -1]
    begin, pieces, total = separator(tokenizer), [], 0
    for index in order:
        pieces.append(np.concatenate([begin, tokenizer.encode(source.read(index))]))
        total += len(pieces[-1])
        if total >= limit:
            break
    return np.concatenate(pieces)[:limit], number - (
        len(pieces) if splits.validation is None else 0
    )


def _held_out_file(
    source: ShardedDocuments, tokenizer: Tokenizer, limit: int, of_training: bool, number: int
) -> tuple[np.ndarray, int]:
    """`held_out` of files: the first tokens of the validation files or of the last training one."""
    if of_training and len(source) < 2:
        raise InputError(
            f"data.path: expected a folder 'validation' beside 'train', or two or more files in "
            f"{source.place}, of which the last is held out, found one; split it, or add some."
        )
    begin, pieces, total = separator(tokenizer), [np.zeros(0, np.int32)], 0
    for text in source.documents(len(source) - 1) if of_training else source.texts():
        pieces.append(np.concatenate([begin, tokenizer.encode(text)]))
        total += len(pieces[-1])
        if total >= limit:
            break
    return np.concatenate(pieces)[:limit], number - of_training


def piece(tokenizer: Tokenizer, begin: np.ndarray, text: str) -> Window:
    """The part of a stream that is a document: inputs (separator and document), targets (the same,
    one token later).
    """
    tokens = np.concatenate([begin, tokenizer.encode(text), begin[:1]])
    return {"inputs": tokens[:-1], "targets": tokens[1:]}


class PackedDocuments(Sequence):
    """Windows {'inputs': (T,), 'targets': (T,)}, int32, of the first `count` documents; `batches`
    is the way to train on them.

    `examples[i]` is the window that begins with document i and runs on into the next ones. threads:
    that read and tokenize training batches; the batches do not depend on it.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        context: int,
        count: int,
        threads: int = 1,
    ):
        self.source, self.tokenizer, self.context, self.threads = (
            source,
            tokenizer,
            context,
            threads,
        )
        self._count, self._separator = count, separator(tokenizer)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):  # type: ignore[override]
        first, pieces = range(len(self))[index], []
        while sum(len(piece["inputs"]) for piece in pieces) < self.context:
            pieces.append(self.piece((first + len(pieces)) % len(self)))
        return {
            key: np.concatenate([piece[key] for piece in pieces])[: self.context]
            for key in pieces[0]
        }

    def piece(self, index: int) -> Window:
        """The part of a stream that is document `index`; see `piece`."""
        return piece(self.tokenizer, self._separator, self.source.read(int(index)))

    def content(self) -> bytes:
        """What tells these documents, as this tokenizer reads them, from others, without reading
        them all.
        """
        first = [self.source.read(index) for index in range(min(len(self), FINGERPRINTED))]
        return json.dumps(
            [len(self), self.source.identity(), self.tokenizer.to_json(), first], sort_keys=True
        ).encode()

    def batches(
        self, batch_size: int, seed: int, process_index: int, process_count: int, prefetch: int
    ) -> grain.DatasetIterator:
        """See `pipeline.train_batches`. An epoch reads every document once, in an order drawn from
        (seed, epoch).
        """
        order, local = (
            grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat(),
            batch_size // process_count,
        )
        lengths, in_this_thread = (
            {"inputs": self.context, "targets": self.context},
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0),
        )

        def stream(row: int) -> grain.IterDataset:
            documents = (
                order.slice(slice(row, None, batch_size))
                .map(self.piece)
                .to_iter_dataset(in_this_thread)
            )
            return grain.experimental.ConcatThenSplitIterDataset(documents, length_struct=lengths)

        rows = _Rows(
            {row: stream(row) for row in range(process_index * local, (process_index + 1) * local)},
            self.threads,
        )
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=prefetch)
        )


class _Rows(grain.IterDataset):
    """Batches {'inputs': (rows, T), 'targets': (rows, T)} of a window of each stream."""

    def __init__(self, streams: Mapping[int, grain.IterDataset], threads: int):
        super().__init__(tuple(streams.values()))
        self._rows, self._threads = tuple(streams), threads

    def __iter__(self) -> grain.DatasetIterator:
        return _RowsIterator(self._rows, [iter(stream) for stream in self.parents], self._threads)  # type: ignore[arg-type]


class _RowsIterator(grain.DatasetIterator):
    """The state is {'rows': {row: state of its stream}}, fit for JSON."""

    def __init__(self, rows: Sequence[int], streams: Sequence[grain.DatasetIterator], threads: int):
        super().__init__(streams)
        self._streams = {str(row): stream for row, stream in zip(rows, streams)}
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __next__(self) -> Window:
        each: Any = self._pool.map if self._pool is not None else map
        windows = list(each(next, self._streams.values()))
        return {key: np.stack([window[key] for window in windows]) for key in ("inputs", "targets")}

    def get_state(self) -> dict[str, Any]:
        return {"rows": {row: stream.get_state() for row, stream in self._streams.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        rows = state.get("rows", {})
        if missing := [row for row in self._streams if row not in rows]:
            raise InputError(
                f"checkpoint: expected the place in the documents of row {missing[0]} of the "
                "batch, found those of rows "
                f"{', '.join(list(rows)[:8]) or 'none'}; states of several processes have to be "
                "joined (pipeline.join_states) before they are saved."
            )
        for row, stream in self._streams.items():
            stream.set_state(_tuples(rows[row]))


def _tuples(state: Any) -> Any:
    """A state as it was before JSON made lists of its tuples, which Grain tells apart."""
    if isinstance(state, Mapping):
        return {key: _tuples(value) for key, value in state.items()}
    return tuple(map(_tuples, state)) if isinstance(state, list | tuple) else state
