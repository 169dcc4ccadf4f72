"""`--model=FOLDER`: published checkpoints of every kind, packed folders and boxed models through
every command that takes a run.
"""

import csv
import json
import shutil

import jax
import jax.export
import numpy as np
import pytest
from PIL import Image

from quweit_jax import pretrained
from quweit_jax.commands import costs, evaluate, export, generate, pack, report
from quweit_jax.errors import InputError
from quweit_jax.pretrained import folders as found_folders
from tests.pretrained import folders
from tests.pretrained.folders import BOS, EOS, LETTERS

pytestmark = pytest.mark.usefixtures("compile_quickly")

KINDS = ("llama", "matmulfree", "gpt2")
TEXT = "the quick brown fox jumps over the lazy dog\n" * 12
ALONE = "--config.mesh.data=1"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        folders.write_language_model(root / kind, kind)
    folders.write_deit(root / "deit")
    folders.write_vit(root / "vit")
    folders.write_language_model(root / "chat", "llama", chat=True)
    return root


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return ["--config.data.source=text_file", f"--config.data.path={path}", ALONE]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in ("blue", "green", "red"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = draw.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return ["--config.data.source=image_folder", f"--config.data.path={root}", ALONE]


def said(capsys, command, *argv):
    capsys.readouterr()
    assert command.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_alias_is_the_same_kind(models):
    for alias, kind in (("llama", "transformer_pp"), ("gpt2", "nanogpt")):
        one, two = (pretrained.load(models / alias, name) for name in (alias, kind))
        assert one[0] == two[0]
        jax.tree.map(np.testing.assert_array_equal, one[1], two[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model(models, text, tmp_path, capsys, kind):
    given = f"--model={models / kind}"
    # generated: the likeliest tokens behind <s> and the prompt
    asked = [given, "--prompt=abc", "--max_tokens=5", "--temperature=0", "--no-packed"]
    made = said(capsys, generate, *asked)
    model, variables = pretrained.load(models / kind)
    ids = [BOS, *map(LETTERS.index, "abc")]
    for _ in range(5):
        token = int(np.argmax(model.apply(variables, np.asarray([ids]))[0, -1]))
        if token == EOS:
            break
        ids.append(token)
    letters = [*LETTERS, "<s>", "</s>", "<u>", *[""] * 6]
    assert made["text"] == "".join(letters[i] for i in ids[4:])
    # evaluated: mean over windows of the last tenth
    facts = said(capsys, evaluate, given, *text, "--context=6")
    held_out = [LETTERS.index(c) for c in TEXT[int(len(TEXT) * 0.9) :]]
    count = (len(held_out) - 6) // 6
    rows = np.asarray([held_out[6 * i : 6 * i + 7] for i in range(count)])
    logits = jax.nn.log_softmax(model.apply(variables, rows[:, :-1]))
    chosen = np.take_along_axis(np.asarray(logits), rows[:, 1:, None], -1)
    assert facts["context"] == 6 and facts["count"] == 6 * count
    np.testing.assert_allclose(facts["loss"], -chosen.mean(), rtol=1e-4)
    # counted: as many parameters as are read, without reading them
    counted = said(capsys, costs, given)
    arrays = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    tied = variables["params"]["token_embedding"]["embedding"].size
    assert counted["parameters"] == arrays and counted["by_kind"]["head"] and tied
    # exported: the program says what the model says
    out = tmp_path / "model.stablehlo"
    assert export.main([given, f"--out={out}", "--platforms=cpu"]) == 0
    about = json.loads(out.with_suffix(".json").read_text())
    canonical = {"llama": "transformer_pp", "gpt2": "nanogpt"}.get(kind, kind)
    assert about["kind"] == canonical and about["tokenizer"]["kind"] == "file"
    program = jax.export.deserialize(bytearray(out.read_bytes()))
    got = program.call(np.asarray(rows[:2, :-1], np.int32))
    expected = model.apply(variables, rows[:2, :-1])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_counting_needs_no_tokenizer(models, tmp_path, capsys):
    bare = shutil.copytree(models / "llama", tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    whole, counted = (said(capsys, costs, f"--model={f}") for f in (models / "llama", bare))
    assert counted == whole
    with pytest.raises(InputError, match="no tokenizer"):
        generate.main([f"--model={bare}", "--prompt=a"])


def test_a_packed_folder_is_as_good_as_what_it_was_made_of(models, text, tmp_path, capsys):
    given, out = f"--model={models / 'matmulfree'}", tmp_path / "packed"
    assert pack.main([given, f"--out={out}"]) == 0
    facts = [
        said(capsys, evaluate, *source, *text, "--context=6")
        for source in ([given, "--packed"], [f"--model={out}"])
    ]
    assert facts[0]["loss"] == facts[1]["loss"] and facts[1]["form"] == "packed"
    texts = []
    for source in (given, f"--model={out}"):
        capsys.readouterr()
        assert generate.main([source, "--prompt=abc", "--max_tokens=6", "--temperature=0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("abc")
    found = found_folders.find(str(out))
    assert found.prompting.special["bos_token"] == "<s>"


@pytest.mark.parametrize("kind", ["deit", "vit"])
def test_a_classifier(models, images, tmp_path, capsys, kind):
    given = f"--model={models / kind}"
    facts = said(capsys, evaluate, given, *images)
    assert facts["count"] == 12
    counted = said(capsys, costs, given)
    model, variables = pretrained.load(models / kind)
    assert counted["parameters"] == sum(x.size for x in jax.tree.leaves(variables))
    out = tmp_path / "model.stablehlo"
    assert export.main([given, f"--out={out}", "--platforms=cpu"]) == 0
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["labels"] == ["blue", "green", "red"] and about["pixels"]["mean"] == [0.5] * 3
    pixels = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    got = jax.export.deserialize(bytearray(out.read_bytes())).call(pixels)
    np.testing.assert_allclose(got, model.apply(variables, pixels), atol=1e-5)
    with pytest.raises(InputError, match="classifier"):
        generate.main([given])


def test_both_layouts_of_a_vit_are_one_model(models):
    (one, first), (two, second) = (pretrained.load(models / kind) for kind in ("deit", "vit"))
    assert one == two
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_report_shows_what_a_model_has(models, tmp_path, capsys):
    given = [f"--model={models / 'matmulfree'}", "--model=mnist-dwn"]
    assert report.main([*given, f"--out={tmp_path / 'page'}", "--precision=int8"]) == 0
    with open(tmp_path / "page" / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["matmulfree", "mnist-dwn"]
    assert rows[0]["dense precision"] == "int8" and float(rows[0]["dense energy, pJ"]) > 0
    assert rows[0]["validation loss"] == "" and float(rows[1]["accuracy"]) > 0.9
    page = (tmp_path / "page" / "index.html").read_text()
    assert "without its run there are no curves" in page and "evaluate --model" in page


def test_what_cannot_be_is_a_sentence(models, text, images, tmp_path):
    llama, deit = f"--model={models / 'llama'}", f"--model={models / 'deit'}"
    for command, argv, message in (
        (evaluate, [llama], "--config.data.source=text_file"),
        (evaluate, [llama, *images], "text for a language model"),
        (evaluate, [deit, *text], "is text"),
        (evaluate, [llama, *text, "--context=21"], "--context"),
        (evaluate, [deit, *images, "--context=4"], "--context"),
        (evaluate, [llama, *text, "--config.data.tokenizer=char"], "data.tokenizer"),
        (evaluate, [llama, *text, "--config.seed=3"], "seed"),
        (evaluate, [llama, *text, "--step=3"], "--step"),
        (costs, [llama, "--memory"], "--memory"),
        (costs, [llama, "--outputs=4"], "--outputs"),
        (export, [deit, "--out=m.stablehlo", "--step_function"], "--step_function"),
        (export, [deit, "--to=c"], "--out"),
        (export, [deit, "--to=c", "--out="], "--out: expected the folder"),
        (export, [llama, "--out="], "--out: expected the file"),
        (export, [llama, "--to=gguf", "--out="], "--out: expected the file"),
        (export, [llama, "--to=onnx"], "found 'onnx'.$"),
        (export, [llama, "--to=c", f"--out={tmp_path / 'c'}"], "language model"),  # without data
        (export, [llama, "--to=c", f"--out={tmp_path / 'c'}", *text], "language model"),
        (generate, [llama, "--chat"], "chat template"),
        (generate, [llama, "--system=no"], "--system"),
        (report, [f"--out={tmp_path / 'page'}"], "no run"),
    ):
        with pytest.raises(InputError, match=message):
            command.main(argv)
    (models / "gpt2" / "tokenizer.json").rename(models / "gpt2" / "away")
    with pytest.raises(InputError, match=r"tokenizer\.json.*save_pretrained"):
        generate.main([f"--model={models / 'gpt2'}"])
    (models / "gpt2" / "away").rename(models / "gpt2" / "tokenizer.json")


def test_a_chat_is_answered_up_to_its_end(models, tmp_path, capsys):
    given = [f"--model={models / 'chat'}", "--prompt=abc", "--max_tokens=8", "--temperature=0"]
    made = said(capsys, generate, *given)
    model, variables = pretrained.load(models / "chat")
    found = found_folders.find(str(models / "chat"))
    ids = found.prompting.encode_chat(found.tokenizer, [{"role": "user", "content": "abc"}])
    text = ids.tolist()
    for _ in range(8):
        text.append(int(np.argmax(model.apply(variables, np.asarray([text]))[0, -1])))
    answer = text[len(ids) :]
    answer = answer[: answer.index(EOS)] if EOS in answer else answer
    assert made["text"] == found.tokenizer.decode(answer) and made["tokens"] == len(answer)
    plain = said(capsys, generate, *given, "--no-chat")
    same = said(capsys, generate, f"--model={models / 'llama'}", *given[1:])
    assert plain["text"] == same["text"]
    # a token that the checkpoint says ends an answer does
    (models / "chat" / "generation_config.json").write_text(json.dumps({"eos_token_id": answer[0]}))
    assert said(capsys, generate, *given)["tokens"] == 0
