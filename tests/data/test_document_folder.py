"""`data.text.document_folder`: texts and JSON lines of a folder, as training and validation
documents.
"""

import pytest

from quweit_jax.data import pipeline, text, tokenizers
from quweit_jax.data.registry import DataConfig
from quweit_jax.errors import InputError

BYTES = tokenizers.ByteTokenizer()


def test_folder_of_documents(tmp_path):
    (tmp_path / "train" / "deeper").mkdir(parents=True)
    (tmp_path / "val").mkdir()
    (tmp_path / "train" / "a.txt").write_text("first\nof two lines", encoding="utf-8")
    (tmp_path / "train" / "deeper" / "b.jsonl").write_text(
        '{"text": "sécond"}\n\n{"text": "third", "id": 3}', encoding="utf-8"
    )
    (tmp_path / "train" / "notes.md").write_text("not a document")
    (tmp_path / "val" / "c.txt").write_bytes(b"caf\xe9 held out")
    data = pipeline.load(DataConfig("document_folder", path=str(tmp_path), tokenizer="byte"), 8)
    assert [data.train.source.read(i) for i in range(3)] == [
        "first\nof two lines",
        "sécond",
        "third",
    ] and len(data.train) == 3
    assert BYTES.decode(data.validation.tokens) == "\ncaf\ufffd held out"
    alone = pipeline.load(
        DataConfig("document_folder", path=str(tmp_path / "train"), tokenizer="byte"), 4
    )
    assert len(alone.train) == 2 and BYTES.decode(alone.validation.tokens) == "\nthird"
    (tmp_path / "train" / "deeper" / "b.jsonl").write_text('{"text": "fine"}\n{"tex": 1}\n')
    with pytest.raises(
        InputError,
        match=r"""expected \{"text": "..."\} at byte 17 of .*b\.jsonl, found '\{"tex": 1\}'""",
    ):
        text.document_folder(DataConfig(path=str(tmp_path))).train.read(2)
