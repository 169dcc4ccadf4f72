"""Log-likelihoods against a plain loop over tokens, for a model with a fixed context and for one
without.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.data import tokenizers
from quweit_jax.deploy import score
from quweit_jax.deploy.generate import sample_logits
from quweit_jax.errors import InputError
from tests.compiled import quick_jit

pytestmark = pytest.mark.usefixtures("compile_quickly")

TEXT = "the quick brown fox jumps over the lazy dog\n"
TOKENIZER = tokenizers.CharTokenizer.train(TEXT)
CONTEXT = 24
CONFIGS = {
    "gpt": {"name": "gpt", "width": 16, "layers": 1, "heads": 2, "context": CONTEXT},
    "matmulfree": {
        "name": "matmulfree",
        "width": 16,
        "layers": 1,
        "context": CONTEXT,
        "hidden": 16,
    },
}


@pytest.fixture(scope="module", params=CONFIGS)
def scorer(request):
    model = models.build(CONFIGS[request.param], TOKENIZER.vocab_size)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
    variables = {
        **variables,
        "params": jax.tree.map(
            lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, variables["params"]
        ),
    }
    return score.Scorer(model, variables, TOKENIZER, batch_size=3)


@functools.partial(quick_jit, static_argnums=0)
def log_probabilities(model, variables, tokens):
    return jax.nn.log_softmax(model.apply(variables, tokens[None])[0])


def plain(scorer, tokens, begin):
    """Log-probability of tokens[begin:] given all before each, and whether each is the likeliest;
    in one piece.
    """
    read = np.zeros(scorer.context or 4 * len(TEXT), np.int32)  # one length compiles once
    read[: len(tokens) - 1] = tokens[:-1]
    logits = np.asarray(log_probabilities(scorer.model, scorer.variables, read), np.float64)
    found = [logits[i - 1, tokens[i]] for i in range(begin, len(tokens))]
    return sum(found), all(logits[i - 1].argmax() == tokens[i] for i in range(begin, len(tokens)))


def test_log_likelihoods(scorer):
    pairs = [
        ("the quick", " brown"),
        ("the", " fox jumps over"),
        ("", "dog"),
        ("lazy ", "dog"),
        ("the lazy do", "g"),
    ]
    results = scorer.log_likelihoods(pairs)
    newline = TOKENIZER.encode("\n")
    for (context, continuation), (value, greedy) in zip(pairs, results, strict=True):
        tokens = TOKENIZER.encode(context + continuation)
        scored = len(continuation) + (len(context) - len(context.rstrip(" ")))
        tokens = tokens if context else np.concatenate([newline, tokens])
        expected, likeliest = plain(scorer, tokens, len(tokens) - scored)
        assert value == pytest.approx(expected, abs=1e-3) and greedy == likeliest


def test_greedy_continuations_are_known_as_such(scorer):
    text = scorer.generate_until("the ", [], 4)
    wrong = "q" if text[0] != "q" else "z"
    (_, greedy), (_, other) = scorer.log_likelihoods([("the", " " + text), ("the ", wrong)])
    # The space before the continuation belongs to it, so only what comes after it is greedy for
    # certain.
    assert not other
    assert isinstance(greedy, bool)
    assert scorer.log_likelihoods([("the q", scorer.generate_until("the q", [], 3))])[0][1]


def test_rolling_scores_every_token_once(scorer):
    """As the harness does: every window but the first is as long as the model reads."""
    text = TEXT * 2
    tokens = np.concatenate([TOKENIZER.encode("\n"), TOKENIZER.encode(text)])
    size = scorer.context or len(tokens)
    expected = 0.0
    for begin in range(0, len(tokens) - 1, size):
        end = min(begin + size, len(tokens) - 1)
        seen = tokens[max(0, end - size) : end + 1]
        expected += plain(scorer, seen, len(seen) - (end - begin))[0]
    values = scorer.rolling_log_likelihoods([text, "", "a"])
    assert values[0] == pytest.approx(expected, rel=1e-4) and values[1] == 0 and values[2] < 0


def test_white_space_before_a_continuation_belongs_to_it(scorer):
    for between in ("\n", " \n ", " "):
        found = scorer.log_likelihoods([("the fox" + between, "jumps")])
        assert found == scorer.log_likelihoods([("the fox", between + "jumps")])


def test_long_texts_are_read_in_windows_that_carry_the_state(monkeypatch):
    """Of a model without limit: in whatever windows, the scores are those of the whole at once,
    and no array has a window's logits times the text's length.
    """
    model = models.build(CONFIGS["matmulfree"], TOKENIZER.vocab_size)
    variables = jax.jit(model.init)(jax.random.key(1), np.zeros((1, 4), np.int32))
    scorer = score.Scorer(model, variables, TOKENIZER, batch_size=3)
    texts = [TEXT * 3, TEXT[:30], TEXT * 2 + "the fox", "a"]
    start = np.asarray([scorer.start_token()])
    expected = [
        plain(scorer, np.concatenate([start, TOKENIZER.encode(text)]), 1)[0] for text in texts
    ]
    read = []
    step = score._score_window
    monkeypatch.setattr(score, "_score_window", lambda *a: (read.append(a[-1].shape), step(*a))[1])
    for longest, logits in ((16, 2**25), (32, 2**25), (512, 32 * TOKENIZER.vocab_size), (512, 1)):
        monkeypatch.setattr(score, "_LONGEST", longest)
        monkeypatch.setattr(score, "_LOGITS", logits)
        read.clear()
        found = scorer.rolling_log_likelihoods(texts)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert read and all(shape[0] == 3 and shape[1] <= 33 for shape in read)
        pairs = scorer.log_likelihoods([(TEXT * 3 + "the", " brown")])  # one row
        tokens = TOKENIZER.encode(TEXT * 3 + "the brown")
        assert pairs[0][0] == pytest.approx(plain(scorer, tokens, len(tokens) - 6)[0], abs=1e-3)
        assert read[-1][0] == 1


def test_long_texts_are_read_in_windows_behind_a_cache(scorer, monkeypatch):
    """Of models with and without limit: the scores are those of one window."""
    texts = [TEXT[:20], TEXT * 2, "a", ""]
    pairs = [("the quick", " brown"), ("the", " fox jumps over")]
    whole = scorer.rolling_log_likelihoods(texts), scorer.log_likelihoods(pairs)
    read, step = [], score._score_window
    monkeypatch.setattr(score, "_score_window", lambda *a: (read.append(a[-1].shape), step(*a))[1])
    monkeypatch.setattr(score, "_LOGITS", 1)
    np.testing.assert_allclose(scorer.rolling_log_likelihoods(texts), whole[0], rtol=1e-4)
    found = scorer.log_likelihoods(pairs)
    np.testing.assert_allclose([value for value, _ in found], [v for v, _ in whole[1]], rtol=1e-4)
    assert read and all(shape[1] <= score._SHORTEST + 1 for shape in read)


def test_as_many_rows_as_there_are_texts(scorer, monkeypatch):
    rows, padded = [], score.Scorer._padded

    def watched(self, texts, count):
        rows.append(count)
        return padded(self, texts, count)

    monkeypatch.setattr(score.Scorer, "_padded", watched)
    scorer.rolling_log_likelihoods(["the"])
    scorer.log_likelihoods([("the", " fox")] * 2)
    scorer.log_likelihoods([("the", " fox")] * 7)
    assert rows == [1, 2, 3, 3, 3]


def test_long_contexts_are_cut_at_the_front(scorer):
    context = TEXT * 3 + "the quick"
    value, _ = scorer.log_likelihoods([(context, " brown")])[0]
    tokens = TOKENIZER.encode(context + " brown")
    kept = tokens if scorer.context is None else tokens[-(CONTEXT + 1) :]
    assert value == pytest.approx(plain(scorer, kept, len(kept) - 6)[0], abs=1e-3)


def test_generation_stops_at_the_first_stop(scorer):
    whole = scorer.generate_until("the", [], 12)
    assert len(whole) == 12
    stop = whole[5]
    assert scorer.generate_until("the", ["#", stop], 12) == whole[: whole.index(stop)]
    assert scorer.generate_until("the", (stop,), 12) == whole[: whole.index(stop)]


def test_a_stop_alone_is_one_string_and_not_its_letters(scorer):
    whole = scorer.generate_until("the", None, 12)
    assert len(whole) == 12 and scorer.generate_until("the", "", 12) == whole
    assert scorer.generate_until("the", whole[3:6], 12) == whole[: whole.index(whole[3:6])]
    absent = whole[1] + "\n\n#" + whole[2]  # letters of the text, but not together
    assert scorer.generate_until("the", absent, 12) == whole
    for wrong in (3, [3], {"a": 1}.items()):
        with pytest.raises(InputError, match="until"):
            scorer.generate_until("the", wrong, 12)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"stops": [], "max_tokens": 256, "temperature": 0.0, "top_k": 0}),
        ({"until": None, "max_gen_toks": None}, {"stops": [], "max_tokens": 256}),
        ({"until": "Q:"}, {"stops": ["Q:"]}),
        ({"until": ["a", "", None, "bc"]}, {"stops": ["a", "bc"]}),
        *(({name: 7}, {"max_tokens": 7}) for name in score._LENGTHS),
        ({"max_completion_tokens": 4, "max_tokens": 3}, {"max_tokens": 3}),
        ({"max_tokens": 3, "max_new_tokens": 2}, {"max_tokens": 2}),
        ({"max_new_tokens": 2, "max_gen_toks": 1}, {"max_tokens": 1}),
        ({"max_gen_toks": "12", "max_tokens": 3}, {"max_tokens": 12}),
        ({"max_gen_toks": 0}, {"max_tokens": 0}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 0.7, "do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.5, "top_k": 3}, {"temperature": 0.5, "top_k": 3}),
        ({"do_sample": True}, {"temperature": 0.0}),
        ({"do_sample": 0, "temperature": 0.5}, {"temperature": 0.0}),
        ({"temperature": 1, "top_p": 0.95, "num_beams": 1}, {"temperature": 1.0, "top_p": 0.95}),
        ({"repetition_penalty": 1.0, "min_p": None}, {"top_p": 1.0, "min_p": 0.0}),
        ({"repetition_penalty": 1.3, "min_p": 0.1}, {"repetition_penalty": 1.3, "min_p": 0.1}),
        (None, {"stops": [], "max_tokens": 256}),
    ],
    ids=str,
)
def test_generation_options_are_the_harnesss(given, expected):
    found = score.generation_options(given)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"until": 3},
        {"max_new_tokens": -1},
        {"max_gen_toks": "many"},
        {"max_tokens": True},
        {"temperature": float("nan")},
        {"top_k": -2},
        {"until": {"a": 1}},
        {"until": b"a"},
        {"until": [["a"]]},
        {"do_sample": "False"},
        {"top_p": 1.5},
        {"max_length": 100},
        {"num_beams": 10},
        {"repetition_penalty": 0.0, "temperature": 1.0},
        {"typical_p": 0.5},
        {"min_new_tokens": 4},
    ],
    ids=str,
)
def test_wrong_generation_options_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        score.generation_options(wrong)


def test_options_of_generation_that_are_not_known_are_named():
    with pytest.warns(UserWarning, match="use_cache"):
        found = score.generation_options({"until": "a", "use_cache": True})
    assert found["stops"] == ["a"]
    with pytest.raises(InputError, match="generation_kwargs"):
        score.generation_options(["until"])


def test_a_nucleus_is_the_likeliest_that_reach_its_probability():
    logits = jnp.log(jnp.asarray([0.1, 0.5, 0.05, 0.3, 0.05]))
    keys = jax.random.split(jax.random.key(0), 300)

    def drawn(top_p, top_k=0):
        draw = jax.vmap(lambda key: sample_logits(key, logits, 1.0, top_k, top_p))
        return set(np.asarray(jax.jit(draw)(keys)).tolist())

    assert drawn(0.0) == drawn(0.45) == {1} and drawn(0.75) == {1, 3}
    assert drawn(0.85) == {0, 1, 3} and drawn(1.0) == set(range(5))
    assert drawn(0.6, top_k=2) == {1}  # 0.5 of 0.8


def test_sampling_is_what_was_asked_for(scorer):
    likeliest = scorer.generate_until("the", None, 12)
    drawn = {scorer.generate_until("the", None, 12, temperature=50.0, seed=i) for i in range(3)}
    assert len(drawn | {likeliest}) > 2
    one = scorer.generate_until("the", None, 12, temperature=50.0, top_k=1, seed=1)
    assert one == likeliest


def test_errors(scorer):
    with pytest.raises(
        InputError, match="expected a continuation of at least one token, found '' after 'the'"
    ):
        scorer.log_likelihoods([("the", "")])
    if scorer.context is not None:
        with pytest.raises(
            InputError, match="a continuation of 30 tokens doesn't fit the model's context of 24"
        ):
            scorer.log_likelihoods([("the", "x" * 30)])


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_the_harness_on_tasks_of_our_own(scorer, tmp_path, monkeypatch):
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is an extra: pip install 'quweit_jax[harness]'"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        ("the quick", ["fox", "dog"], 1),
        ("over the", ["lazy", "azyl", "zzz"], 0),
    ]  # the harness puts a space before each
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": t, "choices": c, "answer": a}) + "\n" for t, c, a in rows)
    )
    common = (
        "dataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path}/rows.jsonl\ntest_split: test\n"
    )
    choice = (
        'output_type: multiple_choice\ndoc_to_text: "{{text}}"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
    )
    rolling = (
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f"task: own_choice\n{common}{choice}metric_list:\n  - metric: acc\n"
    )
    (tmp_path / "rolling.yaml").write_text(f"task: own_rolling\n{common}{rolling}")
    results = score.evaluate_tasks(scorer, [str(tmp_path)])
    best = [
        int(np.argmax([scorer.log_likelihoods([(text, " " + choice)])[0][0] for choice in choices]))
        for text, choices, _ in rows
    ]
    assert results["own_choice"]["acc,none"] == np.mean(
        [b == answer for b, (_, _, answer) in zip(best, rows)]
    )
    nats = -sum(scorer.rolling_log_likelihoods([text for text, _, _ in rows]))
    assert results["own_rolling"]["bits_per_byte,none"] == pytest.approx(
        nats / np.log(2) / sum(len(text) for text, _, _ in rows)
    )
    with pytest.raises(InputError, match="has no task no_such_task"):
        score.evaluate_tasks(scorer, ["no_such_task"])
