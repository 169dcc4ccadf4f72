"""How published language models are asked: special tokens, chat templates, what ends an answer."""

import json

import pytest

from quweit_jax.data.prompting import Prompting
from quweit_jax.data.tokenizers import ByteTokenizer, FileTokenizer
from quweit_jax.errors import InputError
from tests.pretrained.folders import BOS, EOS, LETTERS, USER, write_tokenizer


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


def letters(text):
    return [LETTERS.index(letter) for letter in text]


def test_a_text_begins_as_the_tokenizer_wants_it(folder):
    tokenizer = FileTokenizer.read(str(folder))
    prompting = Prompting.read(folder, tokenizer)
    assert prompting.encode(tokenizer, "abc").tolist() == [BOS, *letters("abc")]
    assert tokenizer.encode("abc").tolist() == letters("abc")  # what is trained on
    assert tokenizer.end_of_text == EOS
    again = Prompting.from_json(json.loads(json.dumps(prompting.to_json())))
    assert again == prompting
    assert Prompting().encode(ByteTokenizer(), "ab").tolist() == [97, 98]


def test_a_begin_that_only_the_config_tells(folder):
    saved = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for told, expected in ((True, [BOS, 0]), (False, [0])):
        written = json.dumps(config | {"add_bos_token": told})
        (folder / "tokenizer_config.json").write_text(written)
        tokenizer = FileTokenizer.read(str(folder))
        assert Prompting.read(folder, tokenizer).encode(tokenizer, "a").tolist() == expected


def test_messages_become_what_the_template_writes(folder):
    tokenizer = FileTokenizer.read(str(folder))
    prompting = Prompting.read(folder, tokenizer)
    system = {"role": "system", "content": "be brief"}
    user = {"role": "user", "content": "abc"}
    assert prompting.render([system, user]) == "<s>be brief\n<u>abc<u>"
    ids = prompting.encode_chat(tokenizer, [system, user]).tolist()
    assert ids == [BOS, *letters("be brief\n"), USER, *letters("abc"), USER]
    with pytest.raises(InputError, match=r"refuses these messages .who is assistant"):
        prompting.render([{"role": "assistant", "content": "no"}])
    for wrong in ([], [{"role": "robot", "content": "no"}]):
        with pytest.raises(InputError, match="role"):
            prompting.render(wrong)


def test_a_template_of_its_own_file_and_several_by_name(folder):
    tokenizer = FileTokenizer.read(str(folder))
    user = [{"role": "user", "content": "é"}]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "by name"}]
    written = json.dumps(config | {"chat_template": named})
    (folder / "tokenizer_config.json").write_text(written)
    assert Prompting.read(folder, tokenizer).render(user) == "by name"
    template = (
        "{% for m in messages %}\n  {% if m.role == 'robot' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    rendered = Prompting.read(folder, tokenizer).render(user)
    assert json.loads(rendered) == user[0] and "é" in rendered


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% for %}",
        "{{ 1 // 0 }}",
        "{{ messages[9].content.x }}",
    ],
)
def test_a_template_reaches_nothing_and_errors_are_sentences(template):
    prompting = Prompting(chat_template=template)
    with pytest.raises(InputError, match="refuses these messages"):
        prompting.render([{"role": "user", "content": "a"}])


def test_all_tokens_that_end_an_answer(folder):
    tokenizer = FileTokenizer.read(str(folder))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 29}))
    assert Prompting.read(folder, tokenizer).ends == (29,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [29, 30]}))
    assert Prompting.read(folder, tokenizer).ends == (29, 30)
    for wrong in ("</s>", [1.5], [True]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(InputError, match="eos_token_id"):
            Prompting.read(folder, tokenizer)
    with pytest.raises(InputError, match="prompting"):
        Prompting.from_json({"begins": 3})
