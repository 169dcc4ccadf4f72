"""Files of documents as endless streams of tokens cut into windows, where documents can only be
read one after another; `documents` says what such a stream is.

Rows of the global batch are in G groups of equally many, and the files, in an order drawn anew for
each epoch, are dealt to the groups: group g reads the files g, g + G, g + 2 G, ... of that order.
Each row of a group takes the group's next document when it has no tokens left. So a process reads
only the files of its own rows, and any number of processes that divides G make the same global
batches and go on from the same state.

Dimensions: B rows of the global batch, T context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from quweit_jax.data.documents import FINGERPRINTED, Window, piece, separator
from quweit_jax.data.shards import ShardedDocuments
from quweit_jax.data.tokenizers import Tokenizer
from quweit_jax.errors import InputError, needed

with needed("for data"):
    import grain

_OPEN = 128  # files read at a time, by all processes together
Place = tuple[int, int]  # of a document: the place of its file in the drawn order, its number


class StreamedDocuments(Sequence):
    """Windows {'inputs': (T,), 'targets': (T,)}, int32, of files of documents; `batches` is the way
    to train on them, and `len` counts the files.

    `examples[i]` is the window that begins with file i. threads: that read and tokenize training
    batches; the batches do not depend on it.
    """

    def __init__(
        self, source: ShardedDocuments, tokenizer: Tokenizer, context: int, threads: int = 1
    ):
        self.source, self.tokenizer, self.context = source, tokenizer, context
        self.threads, self.separator = threads, separator(tokenizer)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index):  # type: ignore[override]
        group = _Group(self, 1, range(len(self))[index], 1, [0])
        return {key: value[0] for key, value in group.windows().items()}

    def content(self) -> bytes:
        """What tells these documents, as this tokenizer reads them, from others, without reading
        them all.
        """
        first = [text for text, _ in zip(self.source.texts(), range(FINGERPRINTED))]
        told = [self.source.identity(), self.tokenizer.to_json(), first]
        return json.dumps(told, sort_keys=True).encode()

    def batches(
        self, batch_size: int, seed: int, process_index: int, process_count: int, prefetch: int
    ) -> grain.DatasetIterator:
        """See `pipeline.train_batches`. An epoch reads every file once, in an order drawn from
        (seed, epoch).

        Raises:
          InputError: there are fewer files than the processes need.
        """
        most = min(len(self), _OPEN)
        groups = next(n for n in range(min(most, batch_size), 0, -1) if batch_size % n == 0)
        if groups % process_count:
            raise InputError(
                f"data.path: {len(self)} files are read as {groups} streams, which {process_count} "
                f"processes cannot share equally; split them into {process_count} files or a "
                "multiple, or use another --config.batch_size."
            )
        own = range(
            groups // process_count * process_index, groups // process_count * (process_index + 1)
        )
        rows = batch_size // groups
        made = [_Group(self, seed, g, groups, list(range(g * rows, (g + 1) * rows))) for g in own]
        dataset = _Groups(made, self.threads)
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)
        )


class _Group:
    """Rows that are dealt the documents of the same files.

    A row is (the place of the document it is in, how many of its tokens are used, the rest).
    """

    def __init__(
        self, examples: StreamedDocuments, seed: int, number: int, count: int, rows: list[int]
    ):
        self._examples, self._seed = examples, seed
        self._first, self._count, self.rows = number, count, rows
        self._orders: dict[int, np.ndarray] = {}
        self._start((number, 0))
        self._left: dict[int, tuple[Place, int, Window]] = {}

    def _start(self, place: Place) -> None:
        self._file, self._next = place
        self._documents: Iterator[str] | None = None

    def _number(self, file: int) -> int:
        """The file at a place of the endless drawn order."""
        epoch, at = divmod(file, len(self._examples))
        if epoch not in self._orders:
            draw = np.random.default_rng((self._seed, epoch))
            self._orders = {epoch: draw.permutation(len(self._examples))}
        return int(self._orders[epoch][at])

    def _document(self) -> tuple[Place, str]:
        """The next one."""
        for _ in range(len(self._examples) + 1):
            if self._documents is None:
                number = self._number(self._file)
                self._documents = self._examples.source.documents(number, self._next)
            if (text := next(self._documents, None)) is not None:
                place = (self._file, self._next)
                self._next += 1
                return place, text
            self._start((self._file + self._count, 0))
        raise InputError(
            f"data.path: expected documents in {self._examples.source.place}, found none."
        )

    def _tokens(self, text: str) -> Window:
        return piece(self._examples.tokenizer, self._examples.separator, text)

    def windows(self) -> Window:
        """The next window of each row: (rows, T)."""
        found = [self._window(row) for row in self.rows]
        return {key: np.stack([window[key] for window in found]) for key in found[0]}

    def _window(self, row: int) -> Window:
        pieces, missing = [], self._examples.context
        place, used, left = self._left.pop(row, ((0, 0), 0, None))
        while True:
            if left is None:
                place, text = self._document()
                used, left = 0, self._tokens(text)
            taken = {key: value[:missing] for key, value in left.items()}
            left = {key: value[missing:] for key, value in left.items()}
            pieces.append(taken)
            used, missing = used + len(taken["inputs"]), missing - len(taken["inputs"])
            if len(left["inputs"]):
                self._left[row] = place, used, left
            if not missing:
                return {key: np.concatenate([part[key] for part in pieces]) for key in taken}
            left = None

    def state(self) -> dict[str, Any]:
        """By row: the next document of its group, and the place in its own."""
        here = [self._file, self._next]
        at = {row: [*place, used] for row, (place, used, _) in self._left.items()}
        return {str(row): {"next": here, "at": at.get(row)} for row in self.rows}

    def restore(self, states: Mapping[str, Any]) -> None:
        """Reads on from the first document of which a row has still tokens."""
        (end,) = {tuple(states[str(row)]["next"]) for row in self.rows}
        at = {row: states[str(row)]["at"] for row in self.rows}
        wanted = {row: (tuple(found[:2]), found[2]) for row, found in at.items() if found}
        self._left = {}
        self._start(min([end, *(place for place, _ in wanted.values())]))
        while wanted:
            place, text = self._document()
            for row, (of, used) in list(wanted.items()):
                if of == place:
                    left = {key: value[used:] for key, value in self._tokens(text).items()}
                    self._left[row] = place, used, left
                    del wanted[row]
        while (self._file, self._next) != end:
            if (self._file, self._next) > end:
                raise InputError(
                    f"data.path: the files in {self._examples.source.place} hold fewer documents "
                    "than when the checkpoint was saved; put them back, or use a new --workdir."
                )
            self._document()


class _Groups(grain.IterDataset):
    """Batches {'inputs': (rows, T), 'targets': (rows, T)} of a window of each row."""

    def __init__(self, groups: Sequence[_Group], threads: int):
        super().__init__()
        self._groups, self._threads = groups, threads

    def __iter__(self) -> grain.DatasetIterator:
        return _GroupsIterator(self._groups, self._threads)


class _GroupsIterator(grain.DatasetIterator):
    """The state is {'rows': {row: its group's and its own place}}, fit for JSON."""

    def __init__(self, groups: Sequence[_Group], threads: int):
        super().__init__()
        self._groups = groups
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __next__(self) -> Window:
        each: Any = self._pool.map if self._pool is not None else map
        found = list(each(_Group.windows, self._groups))
        return {key: np.concatenate([windows[key] for windows in found]) for key in found[0]}

    def get_state(self) -> dict[str, Any]:
        return {"rows": {row: at for group in self._groups for row, at in group.state().items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        rows = state.get("rows", {})
        own = [str(row) for group in self._groups for row in group.rows]
        if missing := [row for row in own if not isinstance(rows.get(row), Mapping)]:
            raise InputError(
                f"checkpoint: expected the place in the files of row {missing[0]} of the batch, "
                "found none; states of several processes have to be joined (pipeline.join_states)."
            )
        each: Any = self._pool.map if self._pool is not None else map
        list(each(lambda group: group.restore(rows), self._groups))
