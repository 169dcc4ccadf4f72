"""The command lines, used as a new user would: train, go on, evaluate, generate, with relative
paths.
"""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.commands import evaluate, generate, train
from quweit_jax.config import flat, load_file
from quweit_jax.errors import InputError
from quweit_jax.training.optimizers import OptimizerConfig, make_optimizer
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("compile_quickly")

TINY = [
    "--config.model.layers=1",
    "--config.model.width=32",
    "--config.model.heads=2",
    "--config.model.context=16",
    "--config.model.weightless.num_luts=48",
    "--config.batch_size=4",
    "--config.eval_every=5",
    "--config.eval_batches=2",
    "--config.checkpoint_every=5",
    "--config.mesh.data=1",
    "--config.sample_tokens=8",
]


@pytest.fixture
def trained(tiny_text, tmp_path, monkeypatch, capsys):
    """A run made by the command line in the current folder, and what the command said."""
    monkeypatch.chdir(tmp_path)
    spec = (
        f"{REPOSITORY / 'experiments/configs/gpt_char.py'}:quick,mlp=weightless,steps=10,"
        f"data.source=text_file,data.path={tiny_text}"
    )
    assert train.main([f"--config={spec}", "--workdir=runs/x", *TINY]) == 0
    return capsys.readouterr().out


def test_train_ends_with_what_a_user_wants_to_know(trained, tmp_path):
    assert "step 10: validation loss" in trained
    assert "weightless blocks at inference" in trained
    assert "sample:" in trained
    assert "python -m quweit_jax.train --workdir=runs/x --config.steps=20" in trained
    assert (tmp_path / "runs/x/plots/loss.png").read_bytes().startswith(b"\x89PNG")
    rows = [
        json.loads(line) for line in (tmp_path / "runs/x/metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in rows if r["split"] == "validation"] == [5, 10]


def test_the_line_it_gives_goes_on(trained, capsys):
    assert "is saved" not in trained
    assert train.main(["--workdir=runs/x", "--config.steps=20"]) == 0
    said = capsys.readouterr().out
    assert "where step 10 is saved" in said and "step 20: validation loss" in said


def test_evaluate_and_packed_agree(trained, capsys):
    assert evaluate.main(["--workdir=runs/x", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert evaluate.main(["--workdir=runs/x", "--json", "--packed"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert plain["step"] == packed["step"] in (5, 10)
    assert packed["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    assert packed["block_bytes"] > 0
    assert evaluate.main(["--workdir=runs/x", "--step=5"]) == 0
    assert "loss" in capsys.readouterr().out


def test_generate_streams_the_same_text_for_the_same_seed(trained, capsys, tiny_text):
    prompt = tiny_text.read_text()[:5]
    texts = []
    for seed in (1, 1, 2):
        assert (
            generate.main(
                [
                    "--workdir=runs/x",
                    f"--prompt={prompt}",
                    "--max_tokens=40",
                    f"--seed={seed}",
                    "--top_k=5",
                ]
            )
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(prompt) and len(texts[0]) == 46


def test_generate_continues_many_prompts_as_each_alone(trained, capsys, tiny_text, tmp_path):
    lines = [tiny_text.read_text()[:3], tiny_text.read_text()[3:9]]
    assert not any("\n" in line for line in lines)
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n")
    common = ["--workdir=runs/x", "--max_tokens=12", "--top_k=5", "--seed=4"]
    options = [f"--prompts={tmp_path / 'prompts.txt'}", "--samples=2", "--json"]
    assert generate.main([*common, *options]) == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [(p, s) for p in lines for s in (4, 5)]
    assert "a second; packed" in said.err and "48 tokens" in said.err
    assert generate.main([*common, f"--prompt={lines[1]}"]) == 0
    alone = capsys.readouterr().out
    assert alone == lines[1] + rows[2]["text"] + "\n"
    stop = rows[2]["text"][5:7]
    assert generate.main([*common, f"--prompt={lines[1]}", f"--stop={stop}", "--no-packed"]) == 0
    cut = capsys.readouterr()
    assert cut.out == (alone[: len(lines[1]) + rows[2]["text"].index(stop)] + "\n")
    assert "not packed" in cut.err


def test_prompts_that_cannot_be_are_named(trained, monkeypatch, capsys):
    run = ["--workdir=runs/x", "--max_tokens=3"]
    for options, said in (
        (["--prompt=a", "--prompts=x"], "both"),
        (["--prompts=nothing-there"], "--prompts"),
        (["--prompt="], "at least one character"),
        (["--samples=0"], "--samples"),
        (["--top_p=2"], "--top_p"),
        (["--min_p=-1"], "--min_p"),
        (["--repetition_penalty=0"], "--repetition_penalty"),
    ):
        with pytest.raises(InputError, match=said):
            generate.main([*run, *options])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"to")))
    assert generate.main([*run, "--prompt=-"]) == 0
    assert capsys.readouterr().out.startswith("to")


@pytest.mark.parametrize(
    "name", ["dwn_digits.py:default", "dwn_mnist.py:692", "dwn_cifar.py:small"]
)
def test_a_rate_given_to_a_classifier_is_that_of_its_tables(name):
    """They have nothing but tables and scores, so that any other rate would change nothing."""
    config = load_file(f"{REPOSITORY / 'experiments/configs' / name},lr=0.5,steps=1").optimizer
    optimizer = make_optimizer(OptimizerConfig(**config.to_dict()), 1)
    params = {"luts_0": {"tables": jnp.zeros((2, 4)), "scores": jnp.zeros((3, 4))}}
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, -0.5, rtol=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        "gpt_char.py:quick",
        "gpt_char.py:nanogpt_cpu,mlp=none",
        "gpt_char.py:nanogpt,mlp=weightless",
        "dwn_digits.py",
        "dwn_cifar.py:8000",
        "dwn_mnist.py:2055,luts=1060",
    ],
)
def test_every_config_is_complete(spec):
    config = load_file(str(REPOSITORY / "experiments/configs" / spec))
    for key in ("seed", "steps", "batch_size", "eval_every", "checkpoint_every"):
        assert isinstance(config[key], int)
    assert {
        "data.source",
        "data.name",
        "data.data_dir",
        "optimizer.learning_rate",
        "model.name",
        "mesh.data",
    } <= set(flat(config))
