"""The files of a run directory with any value in the place of any other: what is read is right, or
an InputError says which file is wrong. No other exception, and no wait.
"""

import contextlib
import copy
import json
import os
import random

import pytest

from quweit_jax import config as configs
from quweit_jax.commands import sweep
from quweit_jax.costs import technologies
from quweit_jax.data import tokenizers
from quweit_jax.errors import InputError
from quweit_jax.reading import read_json
from quweit_jax.training import metrics, rundir
from quweit_jax.training.setup import assemble

VALUES = (
    *(None, True, -1, 0, 1.5, 10**30, -(10**400), float("inf"), float("nan"), "", "x", "\ud83d"),
    *([], {}, [1, "2"], {"a": {"b": None}}, ["x" * 9], json.loads("[" * 99 + "]" * 99)),
)
WHOLE = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"3",
    "cut short": b'{"model": ',
    "deep": b"[" * 200_000,
    "deep, whole": b'{"a":' * 2000 + b"1" + b"}" * 2000,
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "null bytes": b"\0" * 100,
    "long number": b'{"steps": ' + b"1" * 10_000 + b"}",
}
SPECIAL = ("pipe", "folder", "device", "loop", "gone")


def make_special(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "gone": "nothing"}[kind])


def places(value, path=()):
    """The path of every value inside of a JSON value."""
    yield path
    for key in (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield from places(value[key], (*path, key))


def with_value(value, path, other):
    changed = copy.deepcopy(value)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = other
    return changed


def read_or_refuse(action, *said):
    """Fails on any exception but an InputError that names what it is about."""
    try:
        action()
    except InputError as error:
        assert all(text in str(error) for text in said), error


@pytest.fixture(scope="module")
def saved(tiny_config):
    """What a run's config.json holds."""
    return configs.to_dict(tiny_config({"model.layers": 1}))


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "environment.json"])
def test_files_that_are_no_objects(kind, name, tmp_path):
    (tmp_path / name).write_bytes(WHOLE[kind])
    with pytest.raises(InputError, match=name):
        read_json(tmp_path / name, "--workdir")
    if name != "environment.json":
        read = rundir.read_config if name == "config.json" else rundir.read_tokenizer
        with pytest.raises(InputError, match=rf"--workdir: .*{name}"):
            read(tmp_path)


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_not_waited_for(kind, tmp_path):
    for name, read in (
        ("config.json", rundir.read_config),
        ("tokenizer.json", rundir.read_tokenizer),
        ("metrics.jsonl", metrics.evaluations),
        ("list.json", lambda folder: technologies.technology_of(folder / "list.json")),
    ):
        make_special(tmp_path / name, kind)
        with pytest.raises(InputError, match=name):
            read(tmp_path)


def test_any_value_anywhere_in_a_config(saved, tmp_path):
    tokenizer, draw = tokenizers.ByteTokenizer(), random.Random(0)
    for path in places(saved):
        for value in draw.sample(VALUES, 3) if path else ():  # all of them would take a minute
            (tmp_path / "config.json").write_text(json.dumps(with_value(saved, path, value)))

            def read():
                config = rundir.read_config(tmp_path)
                assemble(config, tokenizer, read_data=False, training=False)

            read_or_refuse(read)


def test_a_config_of_another_program(saved, tmp_path):
    for other in ({"n_layer": 2, "n_head": 2}, {"model": "gpt2"}, {}, {"model": {"name": 3}}):
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match=r"--workdir: .*config\.json .*no config of a run"):
            rundir.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**saved, "steps": "4"}))
    with pytest.raises(InputError, match="steps: expected a whole number, found the text '4'"):
        rundir.read_config(tmp_path)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_any_value_anywhere_in_a_tokenizer(kind, tmp_path):
    whole = tokenizers.train(kind, "some text", bpe_vocab_size=257).to_json()
    if kind == "bpe":
        whole["tokenizer"]["model"]["vocab"] = {"a": 0, "b": 1}
    for path in places(whole):
        for value in VALUES if path else ():
            (tmp_path / "tokenizer.json").write_text(json.dumps(with_value(whole, path, value)))

            def read():
                loaded = tokenizers.load(tmp_path / "tokenizer.json")
                with contextlib.suppress(InputError):  # of another alphabet
                    loaded.decode(loaded.encode("ab"))

            read_or_refuse(read, "tokenizer.json")


ROW = {"step": 4, "split": "validation", "loss": 1.0, "accuracy": 0.5, "seconds": 1.0}


def test_any_value_anywhere_in_the_metrics(saved, tmp_path):
    point = sweep.Point("a", {}, configs.from_dict({**saved, "steps": 9}), tmp_path, ())
    good = json.dumps({**ROW, "step": 9, "loss": 2.0})
    for path in places(ROW):
        for value in VALUES:
            bad = json.dumps(with_value(ROW, path, value) if path else value)
            (tmp_path / "metrics.jsonl").write_text(f"{bad}\n{good}\n")
            found = sweep.result_of(point)
            assert found["step"] == 9 and found["validation_loss"] == 2.0


@pytest.mark.parametrize("kind", WHOLE)
def test_bad_rows_are_counted_and_left_out(kind, tmp_path):
    good = json.dumps(ROW).encode()
    (tmp_path / "metrics.jsonl").write_bytes(
        b"\n".join([good, WHOLE[kind], good, b'{"step": 5, "spl'])
    )
    rows, bad = metrics.read_lines(tmp_path / "metrics.jsonl")
    assert rows == [ROW, ROW] and bad == bool(WHOLE[kind])


@pytest.mark.parametrize(
    ("value", "annotation", "read"),
    [
        (3.0, int, 3),
        (3, float, 3),
        (None, float | None, None),
        ([64, 32], int | tuple[int, ...], (64, 32)),
        ("a", str | None, "a"),
        (True, bool, True),
        ({"x": 1}, object, {"x": 1}),
    ],
)
def test_values_that_fit(value, annotation, read):
    found = configs.checked(value, annotation, "key")
    assert found == read and type(found) is type(read)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (True, int),
        (1, bool),
        ("3", int),
        (1.5, int),
        (None, str),
        ([1.5], tuple[int, ...]),
        ([1], int),
    ]
    + [(2**63, int), (float("nan"), int), ({}, float | None), (3, str)],
)
def test_values_that_do_not_fit(value, annotation):
    with pytest.raises(InputError, match=r"key: expected .*, found"):
        configs.checked(value, annotation, "key")
