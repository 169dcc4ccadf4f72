"""`python -m quweit_jax.costs`, as a user would: a config or a run, as text and as JSON, without
any data.
"""

import json

import pytest

from quweit_jax.commands import costs as command
from quweit_jax.config import to_dict
from quweit_jax.data import tokenizers
from quweit_jax.errors import InputError
from tests.conftest import REPOSITORY

PAPER = f"--config={REPOSITORY / 'experiments/configs/vit_cifar.py'}:paper,mlp=weightless"
NANOGPT = f"--config={REPOSITORY / 'experiments/configs/gpt_char.py'}:nanogpt,mlp=weightless"
NOWHERE = "--config.data.data_dir=/no/such/folder"


def ask(capsys, *arguments):
    assert command.main([*arguments]) == 0
    return capsys.readouterr().out


def test_json_has_what_is_promised(capsys):
    found = json.loads(ask(capsys, PAPER, NOWHERE, "--json"))
    assert {
        "multiplications",
        "additions",
        "lookups",
        "comparisons",
        "bytes",
        "energy_pj",
        "multiplications_replaced",
    } <= found.keys()
    assert (
        found["multiplications"]["total"]
        == found["multiplications"]["int8"] + found["multiplications"]["int16xint8"]
    )
    assert found["baseline"]["multiplications"]["total"] == 1_253_493_120
    assert 0.55 < found["multiplications_replaced"] < 0.56
    assert found["lookups"] == {"total": 12 * 197 * 1536, "4": 12 * 197 * 1536}
    assert set(found["energy_pj"]) == set(found["energy_ratio"]) == {"45nm", "7nm"}
    energy = found["energy_pj"]["45nm"]
    assert (
        energy["total"]
        == pytest.approx(energy["arithmetic"] + energy["memory"])
        == pytest.approx(sum(energy["by_kind"].values()))
    )
    assert found["bytes"]["stored"]["total"] == found["bytes"]["inference"]["weights"]
    assert any("cifar10" in said for said in found["assumptions"]["7nm"])


def test_text_says_what_json_says(capsys):
    text = ask(
        capsys,
        NANOGPT,
        NOWHERE,
        "--layers",
        "--technology=45nm",
        "--lut_model=fpga",
        "--levels=weights=sram_1mb",
        "--context=128",
    )
    found = json.loads(ask(capsys, NANOGPT, "--json", "--technology=45nm", "--context=128"))
    for said in (
        "one token at a context of 128",
        f"multiplications replaced: {found['multiplications_replaced']:.2%}",
        "baseline, the same model with dense MLPs: "
        f"{found['baseline']['multiplications']['total']:,} multiplications",
        "block_5/attention/qkv",
        "conditional_sum",
        "Kuon and Rose",
        "weights in sram_1mb",
        "65, the characters of tiny_shakespeare",
    ):
        assert said in text
    assert "7nm" not in text and max(map(len, text.split("\n"))) < 300


def test_a_run_needs_only_its_config_and_tokenizer(capsys, tmp_path, tiny_config):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny_config())))
    with pytest.raises(InputError, match="--outputs"):
        command.main([f"--workdir={tmp_path}"])
    tokenizers.save(tokenizers.CharTokenizer.train("abcde"), tmp_path / "tokenizer.json")
    found = json.loads(ask(capsys, f"--workdir={tmp_path}", "--json"))
    head = 5 * 32
    assert found["by_kind"]["head"]["multiplications"] == head
    assert (
        json.loads(ask(capsys, f"--workdir={tmp_path}", "--outputs=7", "--json"))["by_kind"][
            "head"
        ]["multiplications"]
        == 7 * 32
    )


def test_models_without_a_dense_twin(capsys):
    text = ask(capsys, f"--config={REPOSITORY / 'experiments/configs/dwn_digits.py'}")
    assert "no dense baseline" in text and "multiplications: none" in text
    text = ask(capsys, f"--config={REPOSITORY / 'experiments/configs/matmulfree.py'}:13b")
    assert "multiplications replaced: 100.00%" in text and "baseline, Transformer++" in text


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([PAPER, "--outputs=0"], "--outputs: expected at least 1"),
        ([PAPER, "--technology=3nm"], "found '3nm'"),
        ([PAPER, "--levels=weights"], "level of weights"),
        ([PAPER, "--config.model.mlp=sparse"], "found 'sparse'"),
        ([NANOGPT, "--context=500"], "1 to 256 tokens, found 500"),
        (
            [f"--config={REPOSITORY / 'experiments/configs/vit_cifar.py'}:paper,dataset=flowers"],
            "the classes of flowers are not known",
        ),
        (["--workdir=/no/such/run"], "no run in /no/such/run"),
    ],
)
def test_mistakes_are_named(arguments, said):
    with pytest.raises(InputError, match=said):
        command.main(arguments)


def test_memory_of_training_beside_it(capsys, monkeypatch):
    """What is measured is tested in tests/costs/test_memory.py; here, that it is asked for with
    the config's values, and shown.
    """
    asked = []

    def measured(config, outputs):
        asked.append((config.model.width, outputs))
        return {"with remat": {"parameters": 1234, "total": 5678}}

    monkeypatch.setattr(command, "training_memory", measured)
    tiny = ["--config.model.width=12", "--outputs=7", "--memory"]
    assert "bytes of a training step, with remat: 5,678 (parameters 1,234)" in ask(
        capsys, NANOGPT, *tiny
    )
    assert (
        json.loads(ask(capsys, NANOGPT, *tiny, "--json"))["training_memory"]["with remat"]["total"]
        == 5678
    )
    assert asked == 2 * [(12, 7)]
