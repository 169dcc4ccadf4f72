"""Every mistake has its own message, which says what was expected, what was found and what to do:
no traceback, status 2 (or 1).
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quweit_jax import pretrained
from quweit_jax.commands import cli, evaluate, generate, train
from quweit_jax.errors import InputError
from quweit_jax.ops import lut
from quweit_jax.training import loop
from tests.conftest import REPOSITORY, write_text

SMALL = {
    "model.layers": 1,
    "model.mlp": "dense",
    "steps": 4,
    "checkpoint_every": 2,
    "eval_every": 4,
}


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """`command(train, *arguments)`: exit status and standard error of a command line, run in this
    process.
    """

    def run(module, *arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run(module.main)
        return ended.value.code, capsys.readouterr().err

    return run


def refused(outcome: tuple[int, str], *said: str, status: int = 2) -> None:
    code, error = outcome
    lines = error.strip().splitlines()
    assert code == status and len(lines) == 1 and lines[0].startswith("error: "), error
    for pattern in said:
        assert re.search(pattern, lines[0]), f"{pattern!r} is not in {lines[0]!r}"


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained") / "run"
    loop.fit(tiny_config(SMALL), workdir)
    return workdir


# Changes of a config that end in the same kind of message: (path, value, what must be said).
VALUES = [
    ("stepz", "3", r"--config.stepz: unknown key 'stepz'. Did you mean 'steps'\?"),
    (
        "model.weightless.num_lut",
        "3",
        r"unknown key 'model.weightless.num_lut'. Did you mean 'model.weightless.num_luts'\?",
    ),
    ("model", "3", "unknown key 'model'"),
    ("steps", "many", r"--config.steps: expected a whole number such as \d+, found 'many'"),
    ("steps", "1.5", r"--config.steps: expected a whole number such as \d+, found '1.5'"),
    ("steps", "0", "steps: expected at least 1, found 0"),
    ("steps", "True", r"--config.steps: expected a whole number such as \d+, found 'True'"),
    (
        "data.download",
        "3",
        "--config.data.download: expected true or false such as True, found '3'",
    ),
    (
        "optimizer.learning_rate",
        "fast",
        r"--config.optimizer.learning_rate: expected a number such as [\d.]+, found 'fast'",
    ),
    (
        "optimizer.learning_rate",
        "none",
        r"--config.optimizer.learning_rate: expected a number such as [\d.]+, found 'none'",
    ),
    (
        "optimizer.learning_rate",
        "-1",
        r"optimizer.learning_rate: expected a positive number, found -1.0",
    ),
    (
        "optimizer.vectors_learning_rate",
        "fast",
        "--config.optimizer.vectors_learning_rate: expected a number or none, found 'fast'",
    ),
    ("optimizer.clip", "-1", "optimizer.clip: expected 0 or more, found -1.0"),
    ("optimizer.beta2", "1", "optimizer.beta2: expected 0 <= beta2 < 1, found 1.0"),
    ("optimizer.ema", "1", "optimizer.ema: expected 0 <= ema < 1, found 1.0"),
    (
        "optimizer.schedule",
        "linear",
        r"optimizer.schedule: expected one of \['cosine', 'constant'\], found 'linear'",
    ),
    (
        "model.weightless.beta",
        "abc",
        "--config.model.weightless.beta: expected a number or none, found 'abc'",
    ),
    (
        "model.weightless.num_luts",
        "(1.5,)",
        r"--config.model.weightless.num_luts: expected a whole number or several such as \(64, "
        r"32\), found",
    ),
    (
        "model.weightless.lut_inputs",
        "9",
        "model.weightless.lut_inputs: a table can have 1 to 8 inputs, found 9; use more, smaller "
        "tables",
    ),
    ("model.mlp", "dens", r"model.mlp: expected one of .*, found 'dens'. Did you mean 'dense'\?"),
    ("model.mlp", "dense+none+none", "model.mlp: expected 1 kind or 1 .one a block., found 3"),
    ("model.heads", "3", "model.width: 32 is not a multiple of model.heads = 3; use 33"),
    (
        "batch_size",
        "7",
        "batch_size: 7 cannot be divided over 2 devices .mesh.data x mesh.fsdp.; use 6 or 8, or a "
        "smaller --config.mesh.data",
    ),
    ("grad_accum", "3", "grad_accum: batch_size 8 cannot be cut into 3 equal parts"),
    (
        "mesh.data",
        "512",
        r"mesh: data=512 x fsdp=1 x tensor=1 needs 512 devices, found \d+; change --config.mesh",
    ),
    ("seed", "-1", "seed: expected a whole number from 0 to 4294967295, found -1"),
    ("eval_batches", "-1", "eval_batches: expected 0 or more, found -1"),
    ("sample_tokens", "-5", "sample_tokens: expected 0 or more, found -5"),
    ("data.source", "txt", r"data.source: expected one of .*'text_file'.*, found 'txt'"),
    (
        "data.source",
        "digits",
        "data.source: digits has labelled examples, but model gpt reads text; use a text source",
    ),
    ("data.path", "missing.txt", "data.path: no file at missing.txt"),
    (
        "data.path",
        "",
        "data.path: expected the path of a text file for data.source=text_file, found nothing; "
        "add --config.data.path=FILE",
    ),
    (
        "data.validation_fraction",
        "1.5",
        "data.validation_fraction: expected a share between 0 and 1, found 1.5",
    ),
    (
        "data.tokenizer",
        "words",
        r"data.tokenizer: expected one of \['char', 'byte', 'bpe', 'file'\], found 'words'",
    ),
]


@pytest.mark.parametrize(
    ("path", "value", "said"), VALUES, ids=[f"{path}={value}" for path, value, _ in VALUES]
)
def test_config_values(command, tiny_arguments, tmp_path, path, value, said):
    changes = SMALL | ({"mesh.data": 2} if path == "batch_size" else {})
    outcome = command(
        train, *tiny_arguments(changes), f"--config.{path}={value}", f"--workdir={tmp_path / 'run'}"
    )
    refused(outcome, said)
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_experiment_files(command, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    workdir = f"--workdir={tmp_path / 'run'}"
    refused(
        command(train, "--config=experiments/configs/gpt_chart.py", workdir),
        r"no file at experiments/configs/gpt_chart.py. Did you mean "
        r"'experiments/configs/gpt_char.py'\?",
    )
    refused(
        command(train, "--config=experiments/configs/gpt_char.py:quik", workdir),
        r"config variant: expected one of \['quick', .*\], found 'quik'. Did you mean 'quick'\?",
    )
    refused(
        command(train, "--config=experiments/configs/gpt_char.py:quick,mpl=dense", workdir),
        r"config argument: unknown key 'mpl'. Did you mean 'mlp'\?",
    )
    refused(
        command(train, "--config=experiments/configs/gpt_char.py:quick,dense", workdir),
        "config argument: expected key=value after the variant, found 'dense'",
    )
    refused(
        command(train, "--config=experiments/configs/gpt_char.py:quick", "--config.steps", workdir),
        "--config.steps: expected a value; write --config.steps=VALUE",
    )
    refused(
        command(train, workdir, "--config.steps"),
        "--config.steps: expected a value; write --config.steps=VALUE",
    )
    refused(
        command(train, workdir),
        "--config: expected an experiment file to begin a run in .*, such as "
        "--config=experiments/configs/gpt_char.py:quick",
    )
    (tmp_path / "empty.py").write_text("x = 1\n")
    refused(
        command(train, f"--config={tmp_path / 'empty.py'}", workdir),
        r"--config: .*empty.py has no get_config\(argument\)",
    )


def test_missing_data(command, tiny_arguments, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    tfds = tiny_arguments(
        SMALL
        | {
            "data.source": "tfds",
            "data.name": "tiny_shakespeare",
            "data.data_dir": tmp_path / "nowhere",
        }
    )
    refused(
        command(train, *tfds, workdir),
        "data.data_dir: no directory at .*nowhere; give the folder that holds "
        "tiny_shakespeare/VERSION/",
    )
    short = tmp_path / "short.txt"
    short.write_text("abc def\n" * 3)
    refused(
        command(train, *tiny_arguments(SMALL | {"data.path": short}), workdir),
        r"data: the validation text has 3 tokens, fewer than the context of 16 and one to "
        r"predict; use more text or --config.model.context=2",
    )
    short.write_bytes(b"\xff\xfe\x00abc")
    refused(
        command(train, *tiny_arguments(SMALL | {"data.path": short}), workdir),
        "data.path: .*short.txt is not UTF-8 text .byte 0.; convert it first",
    )


def test_another_text(command, tiny_arguments, trained, tmp_path):
    other = write_text(tmp_path / "other.txt", alphabet="ABCDE")
    said = (
        r"vocabulary mismatch: the text has 'A', 'B', .*, which the \d+ characters this model was "
        r"trained on do not include"
    )
    refused(command(evaluate, f"--workdir={trained}", f"--config.data.path={other}"), said)
    refused(
        command(train, f"--workdir={trained}", f"--config.data.path={other}", "--config.steps=6"),
        said,
    )
    same_letters = write_text(tmp_path / "same_letters.txt", seed=5)
    refused(
        command(
            train, f"--workdir={trained}", f"--config.data.path={same_letters}", "--config.steps=6"
        ),
        r"--workdir: the data has changed since this run began \(fingerprint \w+, now \w+\); give "
        r"it the same data",
    )


def test_workdirs(command, tiny_arguments, trained, tmp_path):
    refused(
        command(
            train,
            *tiny_arguments(SMALL | {"model.width": 64, "optimizer.clip": 2.0}),
            f"--workdir={trained}",
        ),
        r"belongs to another config: model.width \(there 32, now 64\); optimizer.clip \(there "
        r"1.0, now 2.0\). Give a new --workdir, or leave --config out to go on",
    )
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("")
    refused(
        command(train, *tiny_arguments(SMALL), f"--workdir={full}"),
        "--workdir: .*full holds files but no config.json, so it is no run directory; give a new "
        "or empty folder",
    )
    refused(
        command(train, *tiny_arguments(SMALL), f"--workdir={full / 'thesis.tex'}"),
        "--workdir: .*thesis.tex is a file; give a folder",
    )
    refused(
        command(train, *tiny_arguments(SMALL), f"--workdir={full / 'thesis.tex' / 'run'}"),
        "--workdir: cannot make .*run .*; give a folder you can write to",
    )
    refused(
        command(train, f"--workdir={trained}", "--config.steps=2"),
        "steps: .* is already at step 4, past the 2 asked for; raise --config.steps",
    )
    for module in (evaluate, generate):
        refused(
            command(module, f"--workdir={full}"),
            r"--workdir: no run in .*full \(no config.json\); start one with "
            r"--config=experiments/configs/FILE.py",
        )
        refused(
            command(module, f"--workdir={tmp_path / 'nowhere'}"),
            r"--workdir: no run in .*nowhere \(no config.json\)",
        )
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"steps": ')
    refused(command(evaluate, f"--workdir={broken}"), "--workdir: .*config.json is damaged")


def test_checkpoints(command, trained, tmp_path):
    refused(
        command(evaluate, f"--workdir={trained}", "--step=3"),
        "no checkpoint of step 3 in .*; there are 2, 4",
    )
    refused(
        command(evaluate, f"--workdir={trained}", "--batches=-1"),
        "batches: expected 0 .the whole validation split. or more, found -1",
    )
    empty = tmp_path / "empty"
    shutil.copytree(trained, empty)
    shutil.rmtree(empty / "checkpoints")
    refused(command(evaluate, f"--workdir={empty}"), "no checkpoints in .*empty")
    (empty / "checkpoints").mkdir()
    refused(
        command(evaluate, f"--workdir={empty}"),
        "--workdir: .*empty has no checkpoint yet; let it train past checkpoint_every = 2 steps",
    )
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    config = json.loads((other / "config.json").read_text())
    config["model"]["width"] = 64
    (other / "config.json").write_text(json.dumps(config))
    refused(
        command(evaluate, f"--workdir={other}"),
        r"checkpoint of step 4: .* expected float32\[.*64.*\], found float32\[.*32.*\]",
    )


def test_damaged_checkpoint_ends_with_status_1(command, trained, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    (damaged / "checkpoints" / "4" / "state" / "_METADATA").unlink()
    refused(
        command(evaluate, f"--workdir={damaged}"),
        "the checkpoint of step 4 is damaged .*_METADATA is missing.*; choose one with --step",
        status=1,
    )


def test_generation(command, trained):
    workdir = f"--workdir={trained}"
    refused(
        command(generate, workdir, "--prompt="),
        "--prompt: expected at least one character, found none",
    )
    refused(
        command(generate, workdir, "--prompt=Ünder"),
        r"vocabulary mismatch: the text has 'Ü', which the \d+ characters this model was trained "
        r"on do not include",
    )
    refused(
        command(generate, workdir, "--temperature=-0.5"),
        r"--temperature: expected 0 .always the likeliest. or more, found -0.5",
    )
    refused(
        command(generate, workdir, "--temperature=nan"), "--temperature: expected 0 .* found nan"
    )
    refused(
        command(generate, workdir, "--top_k=-1"),
        "--top_k: expected 0 .all. or a number of tokens, found -1",
    )
    refused(
        command(generate, workdir, "--max_tokens=-1"), "--max_tokens: expected 0 or more, found -1"
    )
    refused(
        command(generate, workdir, "--step=1", "--prompt=a"),
        "no checkpoint of step 1 in .*; there are 2, 4",
    )


def test_processes(command, tiny_arguments, tmp_path, monkeypatch):
    arguments = [*tiny_arguments(SMALL), f"--workdir={tmp_path / 'run'}"]
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    refused(
        command(train, *arguments),
        "JAX_NUM_PROCESSES is set without JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID; set all "
        "three",
    )
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    refused(
        command(train, *arguments),
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID: expected whole numbers such as 2 and 0, found '2' "
        "and 'two'",
    )
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    refused(
        command(train, *arguments),
        "JAX_PROCESS_ID: expected 0 to 1, as JAX_NUM_PROCESSES is 2, found 2",
    )


def test_lookups():
    bits, tables = np.zeros((3, 10), np.float32), np.zeros((5, 4), np.float32)
    with pytest.raises(
        InputError,
        match=r"lut_lookup: mapping refers to input 10 but bits has 10 inputs \(valid: 0\.\.9\)",
    ):
        lut.lut_lookup(bits, np.full((5, 2), 10), tables)
    with pytest.raises(InputError, match=r"mapping refers to input -1 but bits has 10 inputs"):
        lut.lut_lookup(bits, np.full((5, 2), -1), tables)
    with pytest.raises(
        InputError,
        match=r"a table can have 1 to 8 inputs, mapping \[5, 9\] asks for 9; use more, smaller "
        r"tables",
    ):
        lut.lut_lookup(bits, np.zeros((5, 9), np.int32), np.zeros((5, 512), np.float32))
    with pytest.raises(
        InputError, match=r"5 tables of 2 inputs must have shape \[5, 4\] .*, found \[5, 5\]"
    ):
        lut.lut_lookup(bits, np.zeros((5, 2), np.int32), np.zeros((5, 5), np.float32))
    with pytest.raises(
        InputError, match=r"mapping must be an integer array \(L, n\), found float32\[5, 2\]"
    ):
        lut.lut_lookup(bits, np.zeros((5, 2), np.float32), tables)


LONG = "x" * 300  # no file system takes such a name


@pytest.mark.parametrize(
    ("module", "arguments", "key"),
    [
        (train, [f"--config={LONG}.py", "--workdir=run"], "--config"),
        (train, ["--config=CONFIG", f"--workdir={LONG}"], "--workdir"),
        (train, ["--config=CONFIG", "--workdir=run", f"--config.init_from={LONG}"], "init_from"),
        (evaluate, [f"--workdir={LONG}"], "--workdir"),
    ],
)
def test_names_that_are_too_long_are_refused(
    command, tiny_arguments, tmp_path, monkeypatch, module, arguments, key
):
    monkeypatch.chdir(tmp_path)
    given = [
        w for a in arguments for w in (tiny_arguments(SMALL) if a == "--config=CONFIG" else [a])
    ]
    refused(command(module, *given), key)
    assert not list(tmp_path.iterdir())


def test_published_checkpoints_of_too_long_a_name_are_refused(tmp_path):
    for kind in pretrained.KINDS:
        with pytest.raises(InputError, match=r"^pretrained"):
            pretrained.load(tmp_path / LONG, kind)
