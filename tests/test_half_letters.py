"""Prompts and arguments as a terminal gives them, whatever bytes they hold."""

import os

import pytest

from quweit_jax.commands import cli, generate
from quweit_jax.errors import InputError
from quweit_jax.training import loop


def test_a_prompt_of_half_a_letter_is_continued(tiny_config, tmp_path, capsys):
    given = {"model.layers": 1, "model.mlp": "dense", "steps": 2, "data.tokenizer": "byte"}
    loop.fit(tiny_config(given), tmp_path / "run", progress=False)
    for prompt in ("\ud83d", os.fsdecode(b"caf\xe9"), "\ufeffone\r\ntwo"):
        arguments = [f"--workdir={tmp_path / 'run'}", f"--prompt={prompt}", "--max_tokens=3"]
        assert generate.main(arguments) == 0
    said = capsys.readouterr().out
    said.encode()
    assert said.startswith("\ufffd") and "caf\ufffd" in said and "one\ntwo" in said


def test_what_a_run_writes_down_is_utf8():
    for argument in ("--workdir=a\udce9", "--config.data.path=a\udce9"):
        made = cli.parser("train", "", "workdir")
        with pytest.raises(InputError, match=argument.partition("=")[0]):
            cli.parse(made, ["--workdir=x", argument])
