"""Checkpoints by their name on a hub: a server of this machine that answers as the hub does."""

import http.server
import json
import threading

import pytest

from quweit_jax.errors import InputError
from quweit_jax.pretrained import hub, saved

FILES = {
    "config.json": b'{"model_type": "gpt2"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights" * 100,
    "pytorch_model.bin": b"not wanted",
    "README.md": b"not wanted",
    "onnx/model.onnx": b"not wanted",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - of all requests

    def log_message(self, format, *args):
        pass

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/some/model"):
            if "/tree/" in path:
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in FILES.items()
                ]
                return self.answer(json.dumps(entries).encode(), Content_Type="application/json")
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": "some/model", "sha": COMMIT, "siblings": siblings, "tags": []}
            return self.answer(json.dumps(info).encode(), Content_Type="application/json")
        if path.startswith("/some/model/resolve/"):
            name = path.split("/", 5)[5]
            if name in FILES:
                about = {"ETag": f'"{name}"', "X_Repo_Commit": COMMIT}
                return self.answer(FILES[name], **about)
        return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("huggingface_hub")
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    Hub.asked.clear()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    yield made
    made.shutdown()
    made.server_close()


def test_what_is_needed_is_fetched_once(server, tmp_path, monkeypatch):
    folder = hub.fetch("some/model", tmp_path)
    found = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert found == wanted
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    # without a network it is there still; another is told how to fetch
    server.shutdown()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.fetch("some/model", tmp_path) == folder
    with pytest.raises(InputError, match=r"cannot be reached.*hf download other/one --local-dir"):
        hub.fetch("other/one", tmp_path)


def test_what_is_not_there_is_a_sentence(server, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no folder no/such.*hf auth login"):
        hub.fetch("no/such", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"quweit_jax\[hub\].*hf download no/such"):
        hub.fetch("no/such", tmp_path)


def test_only_names_are_looked_for_there(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda given: asked.append(given) or given)
    saved.find_model("some/model@main")
    for other in ("shakespear", "/no/such/folder", "runs/x/y", "./runs/x", "some/"):
        with pytest.raises(InputError, match="shakespeare-lookup"):
            saved.find_model(other)
    assert asked == ["some/model@main"]


def test_a_checkpoint_without_weights_is_refused():
    assert hub._wanted(["a.json", "pytorch_model.bin"]) == ["a.json", "pytorch_model.bin"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert hub._wanted(["consolidated.safetensors", *shards]) == shards
    with pytest.raises(InputError, match="expected weights"):
        hub._wanted(["config.json", "model.gguf", "tf/model.safetensors"])
