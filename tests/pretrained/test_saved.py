"""A model in a folder of its own: what is written is read again, what cannot be is refused, and
what comes with the package works.
"""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from quweit_jax import models, pretrained
from quweit_jax.commands import generate, pack, train
from quweit_jax.data import pipeline, tokenizers
from quweit_jax.data.registry import DataConfig
from quweit_jax.deploy.pack import stored_bytes
from quweit_jax.errors import InputError
from quweit_jax.pretrained import rounded, saved
from tests.compiled import quick_jit
from tests.conftest import REPOSITORY
from tests.pretrained import folders

pytestmark = pytest.mark.usefixtures("compile_quickly")

DENSE = "shakespeare-dense"
FORMS = {DENSE: "trained"}  # of those that are not packed


@pytest.fixture(scope="module")
def boxed_models():
    return {name: saved.load_model(saved.find_model(name)) for name in saved.boxed()}


def test_a_run_is_packed_into_a_folder_and_speaks_as_it_did(tiny_arguments, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "model"
    changes = {"model.mlp": "lookup_glu", "steps": 2, "checkpoint_every": 2, "eval_every": 2}
    assert train.main([*tiny_arguments(changes), f"--workdir={run}"]) == 0
    assert pack.main([f"--workdir={run}", f"--out={out}"]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "model.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    said = json.loads((out / "model.json").read_text())
    assert said["form"] == "packed" and said["training_step"] == 2 and "loss" in said["validation"]
    capsys.readouterr()
    texts = []
    for source in (f"--workdir={run}", f"--model={out}"):
        assert generate.main([source, "--prompt=the ", "--max_tokens=12", "--top_k=5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    with pytest.raises(InputError, match="--overwrite"):
        pack.main([f"--workdir={run}", f"--out={out}"])
    assert pack.main([f"--workdir={run}", f"--out={out}", "--trained", "--overwrite"]) == 0
    model, variables = pretrained.load(out)
    assert "packed" not in variables and model.config.mlp == "lookup_glu"
    whole = (out / "model.safetensors").stat().st_size
    assert pack.main([f"--workdir={run}", f"--out={out}", "--bits=6", "--overwrite"]) == 0
    assert (out / "model.safetensors").stat().st_size < whole / 2
    assert saved.load_model(out).about["weight_bits"] == 6
    with pytest.raises(InputError, match="--bits"):
        pack.main([f"--workdir={run}", f"--out={out}", "--bits=9", "--overwrite"])
    for wrong in (["--step=1"], ["--config.seed=3"]):
        with pytest.raises(InputError, match="--model"):
            generate.main([f"--model={out}", *wrong])


def test_what_became_of_rounded_weights_is_told(tmp_path, capsys):
    def told(model, *options):
        capsys.readouterr()
        out = f"--out={tmp_path / 'model'}"
        assert pack.main([f"--model={model}", out, "--overwrite", *options]) == 0
        return capsys.readouterr().out

    said = told(DENSE)  # which has 5 bits a weight
    assert "as trained" in said and "had 5 bits a weight" in said and "--bits=5" in said
    said = told(DENSE, "--bits=3")
    assert "matrices at 3 bits" in said and "rounded again: --bits=5" in said
    said = told(DENSE, "--bits=5")
    assert "matrices at 5 bits" in said and "had" not in said and "trained" not in said
    assert "packed, other matrices at 6 bits" in told("shakespeare-lookup", "--bits=6")
    with pytest.raises(InputError, match="--bits: expected matrices"):
        told("digits-dwn", "--bits=4")


def test_packing_replaces_nothing_of_others(tmp_path):
    def packed(model, out, *options):
        return pack.main([f"--model={model}", f"--out={out}", *options])

    folders.write_language_model(tmp_path / "llama", "llama")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tokenizer.json").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="published checkpoint"):
        packed(tmp_path / "llama", tmp_path / "llama", "--overwrite")
    with pytest.raises(InputError, match=r"--out: .*files already: tokenizer\.json"):
        packed("digits-dwn", tmp_path / "mine")
    with pytest.raises(InputError, match="--out: expected the folder"):
        packed("digits-dwn", "")
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    # what replaces a language model is none because of the tokenizer that was there
    assert packed("shakespeare-lookup", tmp_path / "model") == 0
    assert packed("digits-dwn", tmp_path / "model", "--overwrite") == 0
    assert saved.load_model(tmp_path / "model").tokenizer is None


def test_a_full_disk_is_a_sentence(tmp_path):
    command = [sys.executable, "-m", "quweit_jax", "pack", "--model=shakespeare-lookup"]
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *command, f"--out={tmp_path / 'm'}"]
    done = subprocess.run(limited, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr and not saved.is_saved(tmp_path / "m")


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 4), (1, 1)])
def test_rounded_matrices_are_near_and_take_their_bits(bits, shape):
    rng = np.random.default_rng(bits)
    matrix = rng.normal(size=shape).astype(np.float32)
    matrix[..., 0] = 0
    arrays = {
        "params/a/kernel": matrix,
        "params/a/bias": matrix[..., 0].reshape(-1),
        "wiring/m": np.ones((2, 3), np.int32),
    }
    told, shapes = rounded.encode(arrays, bits)
    assert told["params/a/kernel@codes"].nbytes == -(-matrix.size * bits // 8)
    again = rounded.decode(told, bits, shapes)
    assert again.keys() == arrays.keys()
    steps = np.abs(matrix).reshape(-1, shape[-1]).max(0) / (2 ** (bits - 1) - 1)
    assert (np.abs(again["params/a/kernel"] - matrix) <= steps / 2 * (1 + 1e-5)).all()
    twice = rounded.decode(*_rounded_again(again, bits))
    for name in arrays:
        np.testing.assert_allclose(twice[name], again[name], rtol=1e-6)
        if name not in shapes:
            np.testing.assert_array_equal(again[name], arrays[name])
    with pytest.raises(InputError, match="params/a/kernel"):
        rounded.decode(told, bits, {"params/a/kernel": [*shape, 9]})


def _rounded_again(arrays, bits):
    told, shapes = rounded.encode(arrays, bits)
    return told, bits, shapes


def test_damage_is_a_sentence(tmp_path):
    config = {"name": "gpt", "layers": 1, "heads": 1, "width": 8, "context": 8, "mlp": "dense"}
    model = models.build(config, 5)
    variables = quick_jit(model.init)(jax.random.key(0), np.zeros((1, 2), np.int32))
    saved.save_model(tmp_path / "m", config, 5, variables)
    again = saved.load_model(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, again.variables, dict(variables))
    weights, about = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "model.json"
    whole, text = weights.read_bytes(), about.read_text()
    for damaged in (b"", whole[:40], whole[:-9], b"\xff" * 100):
        weights.write_bytes(damaged)
        with pytest.raises(InputError, match="safetensors"):
            saved.load_model(tmp_path / "m")
    weights.write_bytes(whole)
    for damaged in (
        "null",
        "{}",
        text.replace("version", "v"),
        text.replace('"outputs": 5', '"o": 5'),
    ):
        about.write_text(damaged)
        with pytest.raises(InputError, match=r"model"):
            saved.load_model(tmp_path / "m")
    about.write_text(text)
    assert saved.save_model(tmp_path / "m", config, 5, variables, overwrite=True, bits=5) < 1000
    near = saved.load_model(tmp_path / "m").variables
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.1), near, dict(variables))
    text = about.read_text()
    for damaged in (text.replace('"bits": 5', '"bits": 6'), text.replace('"shapes"', '"s"')):
        about.write_text(damaged)
        with pytest.raises(InputError, match="write the folder again"):
            saved.load_model(tmp_path / "m")
    with pytest.raises(InputError, match="shakespeare-lookup"):
        pretrained.load("shakespear-lookup")


def test_the_package_brings_models_that_work(boxed_models):
    names = {"shakespeare-lookup", "shakespeare-ternary", "cifar10-lookup", "digits-dwn"}
    assert names | {"shakespeare-weightless", DENSE} <= boxed_models.keys()
    size = sum(path.stat().st_size for path in saved.BOX.rglob("*") if path.is_file())
    assert size < 2e6
    for name, found in boxed_models.items():
        assert found.about["validation"] and found.about["form"] == FORMS.get(name, "packed")
        if name != DENSE:
            assert "packed" in found.variables and stored_bytes(found.variables) < 1e6


def test_the_boxed_character_models_are_of_one_size_and_as_many_steps(boxed_models):
    """So that their losses can be compared: the same text, seed, steps, layers and width."""
    found = [each for name, each in boxed_models.items() if name.startswith("shakespeare-")]
    assert len(found) == 4
    for key in ("training_step", "seed", "data_config"):
        assert all(each.about[key] == found[0].about[key] for each in found)
    sizes = [(each.model.config.sizes()[:2], each.model.config.context) for each in found]
    assert all(size == sizes[0] for size in sizes)
    assert all(each.about["validation"]["count"] == 111_424 for each in found)


@pytest.mark.parametrize("name", [n for n in saved.boxed() if "shakes" in n])
def test_the_boxed_language_model_knows_its_text(boxed_models, name):
    """What it gives real text, against what it gives the same letters in another order."""
    found = boxed_models[name]
    assert isinstance(found.tokenizer, tokenizers.CharTokenizer)
    ids = found.tokenizer.encode("First Citizen:\nBefore we proceed any further, hear me speak.\n")
    mixed = np.random.default_rng(0).permutation(ids)
    logits = np.asarray(found.model.apply(found.variables, np.stack([ids, mixed])[:, :-1]))
    chosen = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), np.stack([ids, mixed])[:, 1:, None], -1
    ).mean((1, 2))
    assert chosen[0] > -2.0 > -3.5 > chosen[1]


def test_the_boxed_digits_are_told_apart_as_it_says():
    pytest.importorskip("sklearn")
    found = saved.load_model(saved.find_model("digits-dwn"))
    data = pipeline.load(DataConfig(source="digits"))
    rows = [data.validation[i] for i in range(len(data.validation))]
    logits = found.model.apply(found.variables, np.stack([row["inputs"] for row in rows]))
    right = np.asarray(logits).argmax(1) == [row["targets"] for row in rows]
    assert right.mean() == pytest.approx(found.about["validation"]["accuracy"], abs=0.003)
