"""`serve`: OpenAI's own client gets, of a server on loopback, the answers that `generate` gives."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import threading
import time

import jax
import numpy as np
import openai
import pytest

from quweit_jax import models
from quweit_jax.commands import serve
from quweit_jax.data.asking import Asking
from quweit_jax.data.prompting import Prompting
from quweit_jax.data.tokenizers import CharTokenizer, FileTokenizer
from quweit_jax.deploy import generate
from quweit_jax.deploy.sampling import Sampling, Settings, pick_batch, pick_each
from quweit_jax.deploy.serving import web
from quweit_jax.deploy.serving.engine import Engine, Wanted
from quweit_jax.deploy.serving.requests import ApiError, Offer, check, read_body
from quweit_jax.deploy.serving.slots import Slots
from quweit_jax.errors import InputError
from quweit_jax.pretrained import saved
from tests.compiled import quick_jit

pytestmark = pytest.mark.usefixtures("compile_quickly")

LETTERS = CharTokenizer("\n !abcdefghijklm")
SLOTS, QUEUE = 2, 2
# The second has its context filled several times by the answers below.
MODELS = {
    "matmulfree": {"name": "matmulfree", "width": 8, "layers": 1, "context": 8},
    "gpt": {"name": "gpt", "width": 8, "layers": 1, "heads": 1, "context": 40, "mlp": "dense"},
}


def made(kind):
    model = models.build(MODELS[kind], LETTERS.vocab_size)
    start = jax.device_get(quick_jit(model.init)(jax.random.key(2), np.zeros((1, 1), np.int32)))
    return model, jax.tree.map(lambda p: 5 * p if p.ndim > 1 else p, start)


class Serving:
    """A server in a thread, with a client."""

    def __init__(self, kind, tokenizer=LETTERS, prompting=None):
        self.model, self.variables = made(kind)
        asking = Asking(tokenizer, prompting)
        slots = Slots(self.model, self.variables, SLOTS)
        self.engine = Engine(slots, tokenizer, asking.ends, QUEUE)
        size, context = slots.vocab_size, slots.context
        self.offer = Offer("tiny", asking, size, context, 4000, self.engine.places)
        self.server = web.make_server(self.engine, self.offer, grace=1)
        self.socket = web.bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=30
        )

    def __enter__(self):
        self.engine.start()
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)
        self.engine.close()
        self.socket.close()
        assert not self.thread.is_alive()

    def offline(self, prompt, count, seed, **settings):
        """What `generate` makes of it."""
        ids = LETTERS.encode(prompt)
        tokens = generate.generate_tokens(
            self.model, self.variables, ids, count, seed=seed, **settings
        )
        return LETTERS.decode(list(tokens))

    def complete(self, prompt, count, **options):
        return self.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=count, **options
        )

    def until(self, **counts):
        """Waits until the engine has such counts."""
        end = time.monotonic() + 20
        while not counts.items() <= self.engine.counts().items():
            assert time.monotonic() < end, self.engine.counts()
            time.sleep(0.005)


@pytest.fixture(scope="module")
def serving():
    with Serving("matmulfree") as made:
        yield made


@pytest.fixture(scope="module")
def limited():
    with Serving("gpt") as made:
        yield made


def compiled_in(run):
    found = []

    def listen(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(about)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(found)


def test_a_completion_is_what_generate_gives(serving):
    found = serving.complete("abc", 20, seed=5, temperature=0.9, top_p=0.8)
    assert found.choices[0].text == serving.offline("abc", 20, 5, temperature=0.9, top_p=0.8)
    assert found.choices[0].finish_reason == "length" and found.object == "text_completion"
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 20, 23)


def test_all_settings_of_sampling_are_those_of_generate(serving):
    settings = {"temperature": 1.3, "top_k": 5, "min_p": 0.02, "repetition_penalty": 1.2}
    extra = {name: settings[name] for name in ("top_k", "min_p", "repetition_penalty")}
    found = serving.complete("ab", 30, seed=9, temperature=1.3, extra_body=extra)
    assert found.choices[0].text == serving.offline("ab", 30, 9, **settings)


@pytest.mark.parametrize("kind", ["serving", "limited"])
def test_answers_at_once_are_those_alone(kind, request):
    """More than there are slots, of other lengths and settings, past a context several times; none
    compiles anything.
    """
    here = request.getfixturevalue(kind)
    asked = [("a", 70, 1.0), ("abcdefgh" * 4, 90, 0.7), ("l\nm", 5, 0.0), ("b" * 37, 50, 1.0)]
    found = {}

    def one(number):
        prompt, count, temperature = asked[number]
        made = here.complete(prompt, count, seed=number, temperature=temperature)
        found[number] = made.choices[0].text

    def all_of_them():
        threads = [threading.Thread(target=one, args=(n,)) for n in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert compiled_in(all_of_them) == 0
    for number, (prompt, count, temperature) in enumerate(asked):
        assert found[number] == here.offline(prompt, count, number, temperature=temperature)
        assert len(found[number]) == count
    assert len(set(found[1])) > 3


def test_several_choices_and_prompts(serving):
    found = serving.complete(["ab", "c!"], 12, n=2, seed=3, temperature=1.1, echo=True)
    texts = [choice.text for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert texts == [
        prompt + serving.offline(prompt, 12, seed, temperature=1.1)
        for prompt in ("ab", "c!")
        for seed in (3, 4)
    ]
    by_ids = serving.complete(LETTERS.encode("ab").tolist(), 12, seed=3, temperature=1.1)
    assert "ab" + by_ids.choices[0].text == texts[0]


def test_streamed_pieces_are_the_text(serving):
    options = {"include_usage": True}
    pieces = list(serving.complete("abc", 25, seed=5, stream=True, stream_options=options))
    assert pieces[-1].usage.completion_tokens == 25 and pieces[-1].choices == []
    choices = [piece.choices[0] for piece in pieces[:-1]]
    assert len(choices) == 26
    assert "".join(c.text for c in choices) == serving.offline("abc", 25, 5, temperature=1.0)
    assert [c.finish_reason for c in choices] == [None] * 25 + ["length"]


def test_an_answer_ends_before_a_stop(serving):
    whole = serving.offline("abc", 60, 5, temperature=1.0)
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    for stops in (stop, ["never found", stop]):
        (choice,) = serving.complete("abc", 60, seed=5, stop=stops).choices
        assert (choice.text, choice.finish_reason) == (expected, "stop")
    pieces = [p.choices[0] for p in serving.complete("abc", 60, seed=5, stop=stop, stream=True)]
    assert "".join(p.text for p in pieces) == expected and pieces[-1].finish_reason == "stop"
    serving.until(busy=0)


def test_a_full_queue_is_told(serving):
    """What is refused has cost nothing; then there is room again."""
    with contextlib.ExitStack() as streams:
        for _ in range(SLOTS + QUEUE):
            streams.enter_context(serving.complete("a", 4000, stream=True))
        serving.until(busy=SLOTS, waiting=QUEUE)
        with pytest.raises(openai.RateLimitError) as refused:
            serving.complete("a", 1)
        assert refused.value.code == "rate_limit_exceeded"
        assert refused.value.response.headers["retry-after"] == "1"
    serving.until(busy=0, waiting=0)
    assert serving.complete("a", 1).usage.completion_tokens == 1


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_a_slot(serving, stream):
    serving.until(busy=0)
    before = serving.offline("ab", 30, 7, temperature=1.0)
    connection = http.client.HTTPConnection("127.0.0.1", serving.port)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "stream": stream}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    serving.until(busy=1)
    begun = time.monotonic()
    connection.close()
    serving.until(busy=0)
    assert time.monotonic() - begun < 2
    assert serving.complete("ab", 30, seed=7).choices[0].text == before


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"model": 3}, 400, "model"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [1, True]}, 400, "prompt"),
        ({"prompt": [0, 99]}, 400, "prompt"),
        ({"prompt": "Ü\ud800"}, 422, "prompt"),
        ({"prompt": ["a"] * 5}, 400, "prompt"),
        ({"n": 5}, 400, "n"),
        ({"n": 0}, 400, "n"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 4001}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "1"}, 400, "temperature"),
        ({"top_p": 1.5}, 400, "top_p"),
        ({"top_k": 1.5}, 400, "top_k"),
        ({"min_p": 2}, 400, "min_p"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"repetition_penalty": 1e39}, 400, "repetition_penalty"),
        ({"repetition_penalty": 1e-39}, 400, "repetition_penalty"),
        ({"stream_options": 5}, 400, "stream_options"),
        ({"n": 10**30}, 400, "n"),
        ({"seed": 2**63}, 400, "seed"),
        ({"seed": 2**63 - 1, "n": 2}, 400, "seed"),
        ({"stop": [1]}, 400, "stop"),
        ({"stream": 1}, 400, "stream"),
        ({"stream": True, "stream_options": []}, 400, "stream_options"),
        ({"logprobs": 0}, 400, "logprobs"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"best_of": 2}, 400, "best_of"),
        ({"tempreature": 1}, 400, "tempreature"),
        ({"messages": []}, 400, "messages"),
    ],
    ids=str,
)
def test_bad_requests_are_named(serving, body, status, param):
    with pytest.raises(ApiError) as refused:
        check({"model": "tiny", "prompt": "a"} | body, "completion", serving.offer)
    assert (refused.value.status, refused.value.param) == (status, param)
    assert json.dumps(refused.value.to_json(), ensure_ascii=False).encode()


def test_no_bound_is_told_that_is_none(serving):
    """What is refused as too large is not told 'or more', nor is Python's advice passed on."""
    with pytest.raises(ApiError, match=rf"n: .* 1 to {serving.offer.places}, found 10000"):
        check({"model": "tiny", "prompt": "a", "n": 10**4}, "completion", serving.offer)
    for data, said in ((b"9" * 5000, "5000 digits"), (b"null", "found null"), (b"[1]", "[1]")):
        with pytest.raises(ApiError, match=re.escape(said)) as refused:
            read_body(data)
        assert "sys." not in refused.value.message


def test_what_asks_for_nothing_is_taken(serving):
    nothing = {"logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1}
    nothing |= {"logit_bias": {}, "user": "me", "suffix": None}
    asked = check({"model": "tiny", "prompt": "a"} | nothing, "completion", serving.offer)
    assert len(asked.answers) == 1 and asked.answers[0].max_tokens == 16


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"a": NaN}', b"\xff", b"[" * 100_000, b"9" * 5000]
)
def test_what_is_no_json_object(data):
    with pytest.raises(ApiError) as refused:
        read_body(data)
    assert refused.value.status == 400


def test_errors_reach_the_client(serving, limited):
    with pytest.raises(openai.NotFoundError) as missing:
        serving.client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError):
        serving.complete("Ü", 3)
    with pytest.raises(openai.BadRequestError) as chat:
        serving.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}]
        )
    assert chat.value.code == "no_chat_template"
    with pytest.raises(openai.BadRequestError) as long:
        limited.complete("a" * 41, 3)
    assert long.value.code == "context_length_exceeded"
    kind = "Content-Type"
    for method, path, headers, body, status, said in (
        ("GET", "/v1/nothing", {}, "", 404, "/v1/models"),
        ("POST", "/completions", {}, "", 404, "/v1/completions"),
        ("GET", "/v1/completions", {}, "", 405, "expected POST, found GET"),
        ("POST", "/v1/completions", {kind: "text/plain"}, "{}", 415, "found 'text/plain'"),
        ("POST", "/v1/completions", {kind: "application/json"}, "x" * (2**20 + 1), 413, "bytes"),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", serving.port)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        assert answer.status == status
        error = json.loads(answer.read())["error"]
        assert error.keys() == {"message", "type", "param", "code"} and said in error["message"]
        connection.close()


def test_models_and_health(serving):
    assert [model.id for model in serving.client.models.list()] == ["tiny"]
    assert serving.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        serving.client.models.retrieve("org/other")
    connection = http.client.HTTPConnection("127.0.0.1", serving.port)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    about = json.loads(answer.read())
    connection.close()
    assert answer.status == 200 and about["status"] == "ok" and about["slots"] == SLOTS


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] | replace('u', 'a') }}{{ m.content }}\n{% endfor %}!"
)


@pytest.fixture(scope="module")
def chatting():
    """A tokenizer of words' letters with a special token that ends an answer."""
    import tokenizers

    vocabulary = {letter: i for i, letter in enumerate(LETTERS.vocabulary)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    inner.decoder = tokenizers.decoders.Fuse()
    tokenizer = FileTokenizer._of(inner.to_str(), None, "test")
    end = vocabulary["m"]
    with Serving("gpt", tokenizer, Prompting((end,), None, TEMPLATE)) as made:
        yield made


def test_a_chat_is_answered_by_the_template(chatting):
    messages = [{"role": "user", "content": "abc"}]
    ask = chatting.client.chat.completions.create
    found = ask(model="tiny", messages=messages, seed=4, max_completion_tokens=200)
    (choice,) = found.choices
    whole = chatting.offline("aabc\n!", 200, 4, temperature=1.0)
    assert "m" in whole and choice.finish_reason == "stop"
    assert choice.message.content == whole[: whole.index("m")]
    assert choice.message.role == "assistant" and found.usage.prompt_tokens == 6
    pieces = list(ask(model="tiny", messages=messages, seed=4, max_tokens=200, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert said == choice.message.content and pieces[-1].choices[0].finish_reason == "stop"
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    again = ask(model="tiny", messages=[{"role": "user", "content": parts}], seed=4, max_tokens=200)
    assert again.choices[0].message.content == choice.message.content
    for wrong in ([], [{"role": "user"}], [{"role": "tool", "content": "a"}], [3]):
        with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)):
            ask(model="tiny", messages=wrong)


def test_rows_are_drawn_as_one_alone():
    """With settings in arrays what is drawn is what is drawn with each as a constant; equal logits
    and impossible ones, too.
    """
    draw = np.random.default_rng(0)
    logits = np.round(draw.normal(size=(12, 9)).astype(np.float32) * 3)
    logits[3, 2:] = -np.inf
    logits[4, :4] = np.nan
    seen = draw.random(logits.shape) < 0.5
    samplings = [
        Sampling(0.0),
        Sampling(0.7, 3),
        Sampling(1.3, 0, 0.6),
        Sampling(0.9, 4, 0.9, 0.05, 1.4),
        Sampling(float("inf"), 5),
        Sampling(1e-39),
        Sampling(1.0, 2**40),
        Sampling(0.3, 0, 1.0, 0.2),
        Sampling(0.0, repetition_penalty=1.7),
        Sampling(2.0, 1),
        Sampling(1.1, 0, 0.0),
        Sampling(1.0),
    ]
    keys = jax.random.split(jax.random.key(1), len(samplings))
    pick = jax.jit(pick_each)
    different = set()
    for chosen in (range(12), [0, 5, 7, 8, 11] * 2 + [0, 5]):  # the second sorts nothing
        chosen = list(chosen)
        settings = Settings.of([samplings[i] for i in chosen])
        for step in range(30):
            steps = np.full(12, step, np.int32)
            found = np.asarray(pick(settings, keys, steps, logits, seen)).tolist()
            different.add(tuple(found))
            if step < 4:
                for row, i in enumerate(chosen):
                    one = slice(row, row + 1)
                    alone = pick_batch(samplings[i], keys[one], step, logits[one], seen[one])
                    assert found[row] == alone[0], samplings[i]
    assert len(different) > 20


def test_a_failure_ends_what_is_under_way():
    """And the server with it, which `health` tells."""

    class Broken(Slots):
        def advance(self, active):
            raise RuntimeError("no memory")

    model, variables = made("matmulfree")
    slots = Broken(model, variables, 1)
    engine = Engine(slots, LETTERS, queue=0)
    slots.compile = lambda: None
    ended = threading.Event()
    engine.on_failure = ended.set
    engine.start()
    said = []
    engine.submit([Wanted(np.zeros(1, np.int32), 5, Sampling())], lambda _, new: said.append(new))
    assert ended.wait(20) and said[-1].finish == "error"
    with pytest.raises(web.ClosedError, match="no memory"):
        engine.submit([], print)
    offer = Offer("tiny", Asking(LETTERS, None), 15, None, 5, 1)
    assert asyncio.run(web.Api(engine, offer).health(None)).status_code == 503
    engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as a command is given it."""
    place = tmp_path_factory.mktemp("models") / "small"
    _, variables = made("matmulfree")
    config = MODELS["matmulfree"]
    saved.save_model(place, config, LETTERS.vocab_size, variables, tokenizer=LETTERS)
    return place


def test_the_command_ends_in_order(serving, folder, monkeypatch, capsys):
    """At SIGTERM an answer under way is ended first."""
    listening, said = [], []
    bind = web.bind

    def remembered(host, port):
        listening.append(bind(host, port))
        return listening[0]

    def ask():
        port = listening[0].getsockname()[1]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=30)
        with (
            client,
            client.completions.create(
                model="small", prompt="ab", max_tokens=200, seed=3, temperature=0, stream=True
            ) as pieces,
        ):
            for number, piece in enumerate(pieces):
                said.append(piece.choices[0].text)
                if number == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

    run = web.Server.run

    def run_and_ask(server, sockets):
        thread, tell = threading.Thread(target=ask), server.on_start
        server.on_start = lambda: (tell(), thread.start())
        run(server, sockets)
        thread.join(20)

    monkeypatch.setattr(web, "bind", remembered)
    monkeypatch.setattr(web.Server, "run", run_and_ask)
    given = [f"--model={folder}", "--port=0", "--slots=2", "--queue=0", "--no-packed"]
    assert serve.main(given) == 0
    assert "".join(said) == serving.offline("ab", 200, 3, temperature=0)
    told = capsys.readouterr()
    assert "serving small at http://127.0.0.1:" in told.out and not told.err
    assert "stopping small; answers under way: 1, which have 30 seconds" in told.out


def test_an_answer_that_fails_leaves_the_others(serving, monkeypatch):
    decode = CharTokenizer.decode

    def refuses(tokenizer, ids):
        if tokenizer.vocabulary[0] in (text := decode(tokenizer, ids)):
            raise IndexError("no such token")
        return text

    monkeypatch.setattr(CharTokenizer, "decode", refuses)
    one = Wanted(LETTERS.encode("a"), 5, Sampling(0.0))
    said = {0: [], 1: []}
    bad = Wanted(LETTERS.encode("a"), 4000, Sampling(1.0), seed=1)
    ended = threading.Semaphore(0)

    def hear(number, new):
        said[number].append(new)
        if new.finish:
            ended.release()

    serving.engine.submit([bad, one], hear)
    assert ended.acquire(timeout=20) and ended.acquire(timeout=20)
    assert [said[number][-1].finish for number in (0, 1)] == ["error", "length"]
    assert serving.engine.failure is None


def test_the_network_is_warned_of(folder, monkeypatch, capsys):
    monkeypatch.setattr(web.Server, "run", lambda server, sockets: server.on_start())
    monkeypatch.setattr(Slots, "compile", lambda _: None)
    for host, warned in (("0.0.0.0", True), ("localhost", False)):
        assert serve.main([f"--model={folder}", "--port=0", f"--host={host}", "--no-packed"]) == 0
        assert ("warning: --host=0.0.0.0" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("option", ["slots", "queue", "max_tokens", "grace", "port"])
def test_options_that_cannot_be(option):
    with pytest.raises(InputError, match=f"--{option}"):
        serve.main(["--model=x", f"--{option}=-1"])


def test_what_would_take_too_long_or_too_much(folder, monkeypatch):
    for grace in ("inf", "1e30"):
        with pytest.raises(InputError, match="--grace"):
            serve.main([f"--model={folder}", "--port=0", f"--grace={grace}"])

    def full(slots):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

    monkeypatch.setattr(Slots, "_start", full)
    with pytest.raises(InputError, match=r"--slots: .* bytes each, found 9,000; give fewer"):
        serve.main([f"--model={folder}", "--port=0", "--slots=9000"])


def test_a_port_that_is_taken_is_named():
    with web.bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(InputError, match="--port"):
            web.bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="--host"):
        web.bind("no.such.host.invalid", 0)
