"""Folders of data as they are found in the wild: hidden copies, pipes, loops of links, photographs
lying on their side, texts of other encodings and halves of characters. What can be read is read,
and nothing hangs.
"""

import json
import os
import socket
import tempfile
import threading

import numpy as np
import pytest
from PIL import Image

from quweit_jax.data import pipeline, registry
from quweit_jax.data.registry import DataConfig
from quweit_jax.errors import InputError
from tests.pictures import picture

LONE = "\ud83d"


def image_folder(root, names=("0.png", "1.png", "2.png", "3.png"), classes=("cat", "dog")):
    for c, label in enumerate(classes):
        for i, name in enumerate(names):
            (root / label / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(8, 8, seed=10 * c + i)).save(root / label / name, "png")
    return root


def images(path, **more):
    return registry.load(DataConfig("image_folder", path=str(path), image_size=8, **more))


def documents(path, **more):
    return registry.load(DataConfig("document_folder", path=str(path), **more)).train


def read_all(source):
    return [source.read(i) for i in range(len(source))]


def in_time(action, seconds=20.0):
    """What an action returns or raises; fails if it hangs."""
    found = []

    def run():
        try:
            found.append(action())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs"
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def make_strange(path, kind):
    """Something with a file's name that is no file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made, tempfile.TemporaryDirectory() as short:
            made.bind(f"{short}/s")  # the names of sockets are short
            os.rename(f"{short}/s", path)
    else:
        targets = {"device": "/dev/zero", "nothing": path.parent / "gone", "itself": path}
        path.symlink_to(targets[kind])


STRANGE = ("pipe", "socket", "device", "nothing", "itself")


def test_hidden_names_are_no_images(tmp_path):
    image_folder(tmp_path)
    image_folder(tmp_path, (".ipynb_checkpoints/0-checkpoint.png", "._1.png", "deep/.x/y/9.png"))
    image_folder(tmp_path, classes=(".git",))
    data = images(tmp_path)
    files = [file for split in (data.train, data.validation) for file, _ in split.source.files]
    assert sorted(files) == sorted(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(4))
    assert data.labels == ("cat", "dog")


def test_hidden_names_are_no_documents(tmp_path):
    for name in ("a.txt", "deep/b.txt", ".ipynb_checkpoints/a.txt", "deep/.c/d/e.txt", "._a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_all(documents(tmp_path)) == ["a.txt", "deep/b.txt"]


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_file_is_told_at_once(kind, tmp_path):
    image_folder(tmp_path / "images")
    make_strange(tmp_path / "images" / "cat" / "9.png", kind)
    with pytest.raises(InputError, match=r"data\.path: .*9\.png"):
        in_time(lambda: images(tmp_path / "images"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text")
    make_strange(tmp_path / "texts" / "b.txt", kind)
    with pytest.raises(InputError, match=r"data\.path: .*b\.txt"):
        in_time(lambda: documents(tmp_path / "texts"))
    with pytest.raises(InputError, match=r"data\.path: .*b\.txt"):
        in_time(lambda: registry.load(DataConfig("text_file", path=f"{tmp_path}/texts/b.txt")))


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_image_can_be_left_out(kind, tmp_path):
    image_folder(tmp_path)
    make_strange(tmp_path / "cat" / "9.png", kind)
    data = in_time(lambda: images(tmp_path, skip_bad=True))
    splits = (data.train, data.validation)
    used = [split.get(i) for split in splits for i in range(len(split))]
    assert len(used) == 9 and sum(example is None for example in used) == 1
    (place,) = [text for split in splits for text in pipeline.left_out(split).values()]
    assert "cat/9.png" in place


def test_files_that_vanish(tmp_path):
    image_folder(tmp_path / "images")
    data = images(tmp_path / "images")
    file, _ = data.train.source.files[1]
    os.remove(tmp_path / "images" / file)
    with pytest.raises(InputError, match=file):
        data.train[1]
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / "texts" / name).write_text('{"text": "x"}\n')
    source = documents(tmp_path / "texts")
    for i, name in enumerate(("a.txt", "b.jsonl")):
        os.remove(tmp_path / "texts" / name)
        with pytest.raises(InputError, match=name):
            source.read(i)
    assert "b.jsonl" in source.identity()


def test_loops_of_links_end(tmp_path):
    image_folder(tmp_path / "images")
    (tmp_path / "images" / "cat" / "up").symlink_to("..")
    (tmp_path / "images" / "cat" / "round").symlink_to("round")
    image_folder(tmp_path / "elsewhere", classes=("more",))
    (tmp_path / "images" / "dog" / "linked").symlink_to(tmp_path / "elsewhere" / "more")
    data = in_time(lambda: images(tmp_path / "images"))
    files = {file for split in (data.train, data.validation) for file, _ in split.source.files}
    assert {f"dog/linked/{i}.png" for i in range(4)} <= files
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text")
    (tmp_path / "texts" / "self").symlink_to(".")
    assert read_all(in_time(lambda: documents(tmp_path / "texts"))) == ["a text"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs another user")
def test_what_may_not_be_read_is_told(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("abc " * 100)
    image_folder(tmp_path / "images")
    for path in (tmp_path / "texts" / "a.txt", tmp_path / "images" / "cat"):
        path.chmod(0)
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)

    def as_nobody(action):
        """The message of the InputError that an action of another user raises."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.setresuid(65534, 65534, 65534)
            try:
                action()
                text = "nothing was raised"
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writing, text.encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        with os.fdopen(reading) as said:
            return said.read()

    file = str(tmp_path / "texts" / "a.txt")
    for action in (
        lambda: registry.load(DataConfig("text_file", path=file)),
        lambda: documents(tmp_path / "texts"),
        lambda: images(tmp_path / "images"),
    ):
        assert as_nobody(action).startswith("InputError: data.path: ")


def test_absurd_names(tmp_path):
    odd = os.fsdecode(b"caf\xe9\n.png")
    image_folder(tmp_path, (odd, "$x$.png", "a" * 200 + ".png"), (os.fsdecode(b"\xff"), "b"))
    data = pipeline.load(DataConfig("image_folder", path=str(tmp_path), image_size=8))
    json.dumps(data.labels, ensure_ascii=False).encode()
    assert len(data.train) + len(data.validation) == 6 and data.fingerprint
    for path in ("x" * 5000, "a\0b", "~nobody-of-this-name/x", LONE):
        for source in ("text_file", "document_folder", "image_folder"):
            with pytest.raises(InputError, match=r"data\.path"):
                registry.load(DataConfig(source, path=path))
        with pytest.raises(InputError, match=r"data\.tokenizer_path"):
            pipeline.load(DataConfig(tokenizer="file", tokenizer_path=path), 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(orientation, tmp_path):
    """`ImageOps.exif_transpose` of Pillow says what upright is."""
    from PIL import ImageOps

    image_folder(tmp_path)
    stored = Image.fromarray(picture(6, 10, seed=3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("cat", "dog"):
        for i in range(4):
            stored.save(tmp_path / name / f"{i}.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "cat" / "0.png")))
    for wanted, pixels in ((True, upright), (False, np.asarray(stored))):
        data = registry.load(DataConfig("image_folder", path=str(tmp_path), exif=wanted))
        np.testing.assert_array_equal(data.train[0]["inputs"], pixels / np.float32(255))


def test_damaged_exif_leaves_the_pixels(tmp_path):
    image_folder(tmp_path)
    stored = Image.fromarray(picture(8, 8, seed=3))
    for file in tmp_path.rglob("*.png"):
        stored.save(file, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x12\x01" * 9)
    data = images(tmp_path)
    np.testing.assert_array_equal(data.train[0]["inputs"] * np.float32(255), np.asarray(stored))


PLAIN = "Grüße 数据\nsecond line\n"
SPELLED = {
    "plain": PLAIN.encode(),
    "mark": b"\xef\xbb\xbf" + PLAIN.encode(),
    "windows": PLAIN.replace("\n", "\r\n").encode(),
    "old macs": PLAIN.replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("kind", SPELLED)
def test_a_text_is_the_same_however_it_is_spelled(kind, tmp_path):
    (tmp_path / "a.txt").write_bytes(SPELLED[kind])
    assert read_all(documents(tmp_path)) == [PLAIN]
    for limit in (0, 10, 1000):
        given = DataConfig("text_file", path=str(tmp_path / "a.txt"), limit_bytes=limit)
        found = registry.load(given)
        limited = PLAIN.encode()[: limit or None].decode(errors="ignore")
        assert found.train + found.validation == limited


def test_lines_are_the_same_however_they_are_spelled(tmp_path):
    lines = json.dumps({"text": "\ufeffone\r\ntwo"}) + "\r\n" + json.dumps({"text": "three"})
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert read_all(documents(tmp_path)) == ["one\ntwo", "three"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1251"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_other_encodings_are_refused(encoding, suffix, tmp_path):
    text = "Съешь ещё этих мягких булок" if encoding == "cp1251" else "some plain text"
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode(encoding))
    for source, path in (("document_folder", tmp_path), ("text_file", file)):
        with pytest.raises(InputError, match=rf"data\.path: .*a\.{suffix} is not UTF-8 text"):
            registry.load(DataConfig(source, path=str(path)))


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_half_a_character_does_not_end_training(kind, tmp_path):
    texts = [f"document {i} " + "words " * 9 + LONE * (i == 20) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    given = DataConfig(
        "document_folder",
        path=str(tmp_path),
        tokenizer=kind,
        bpe_vocab_size=300,
        validation_tokens=99,
    )
    data = pipeline.load(given, 16)
    batches = pipeline.train_batches(data.train, 2, 0, prefetch=1)
    seen = [next(batches)["inputs"] for _ in range(150)]
    assert any("\ufffd" in data.tokenizer.decode(row) for batch in seen for row in batch)
    assert data.train.source.read(20) == texts[20].replace(LONE, "\ufffd")


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_tokenizers_take_any_text(kind):
    from quweit_jax.data import tokenizers

    made = tokenizers.train(kind, "some text \ufffd with \ud800 halves", bpe_vocab_size=260)
    assert made.decode(made.encode("me\ud800xt \udfff\ud83d")) == "me\ufffdxt \ufffd\ufffd"


def test_an_image_read_ahead_is_not_called_left_out(tmp_path):
    image_folder(tmp_path)
    data = images(tmp_path)
    (tmp_path / data.train.source.files[1][0]).write_bytes(b"no image")
    with pytest.raises(InputError):
        data.train[1]
    assert data.train.bad and not pipeline.left_out(data.train)


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"])
def test_what_archives_and_servers_add_is_no_data(tmp_path, name):
    """Neither a class nor thumbnails to train on."""
    clean = pipeline.load(DataConfig("image_folder", path=str(image_folder(tmp_path / "a"))))
    root = image_folder(tmp_path / "b")
    for folder in (root / name, root / "cat" / name):
        image_folder(folder, classes=("cat",))
    found = pipeline.load(DataConfig("image_folder", path=str(root)))
    assert found.fingerprint == clean.fingerprint and found.outputs == 2


def test_other_validation_documents_have_another_fingerprint(tmp_path):
    """Documents to validate on are not among those that the data's own fingerprint is made of."""

    def found(validation):
        for split, text in (("train", "some words to train on"), ("validation", validation)):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / "a.txt").write_text(4 * text)
        how = {"tokenizer": "byte", "validation_tokens": 60}
        return pipeline.load(DataConfig("document_folder", path=str(tmp_path), **how), 4)

    before, same, after = (found(text) for text in ("and others", "and others", "and otters"))
    assert before.fingerprint == same.fingerprint == after.fingerprint
    assert before.validation_fingerprint == same.validation_fingerprint
    assert before.validation_fingerprint != after.validation_fingerprint
