"""Run directories in stores of objects: in fsspec's own in memory and, where they are installed, in
emulators of Google's and Amazon's on this machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from quweit_jax.commands import evaluate, export, generate, pack, report, train
from quweit_jax.errors import InputError, RunError
from quweit_jax.training import loop, metrics, stores
from tests.conftest import REPOSITORY, read_checkpoint, write_text
from tests.training.test_distributed import free_port

fsspec = pytest.importorskip("fsspec")
SMALL = {"model.layers": 1, "model.width": 16, "model.mlp": "none", "steps": 4} | {
    "eval_every": 4,
    "checkpoint_every": 2,
    "log_every": 1,
}


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """An address of a store in memory; copies are below tmp_path."""
    monkeypatch.setitem(stores._SERVED, "memory", "fsspec")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    yield "memory://bucket/run"
    store.store.clear()


def names(address):
    store, root = fsspec.core.url_to_fs(address)
    return {path.partition(root + "/")[2] for path in store.find(root)}


def test_what_is_alike_is_not_moved_and_what_differs_is(memory, monkeypatch):
    store = fsspec.filesystem("memory")
    store.pipe({f"/bucket/run/{name}": name.encode() for name in ("a", "b", "checkpoints/2/c")})
    copy = stores.Copy(memory, "--workdir", "train")
    assert sorted(copy.pull().rglob("[abc]")) == [
        copy.local / n for n in ("a", "b", "checkpoints/2/c")
    ]
    moved = []
    for method in ("get_file", "put_file", "rm_file"):
        real = getattr(copy._store, method)
        monkeypatch.setattr(
            copy._store, method, lambda *a, m=method, r=real: moved.append((m, a[0])) or r(*a)
        )
    copy.pull()
    copy.push()
    assert moved == []
    time.sleep(0.01)
    (copy.local / "a").write_text("A")  # as long as before
    (copy.local / "b").unlink()
    for name in ("checkpoints/4/x", "checksums/4.json", "metrics.jsonl"):
        (copy.local / name).parent.mkdir(parents=True, exist_ok=True)
        (copy.local / name).write_text(name)
    copy.push()
    order = [name.removeprefix(f"{copy.local}/") for method, name in moved if method == "put_file"]
    assert order == ["a", "metrics.jsonl", "checkpoints/4/x", "checksums/4.json"], "that is last"
    assert moved[-1] == ("rm_file", "/bucket/run/b")
    assert store.cat("/bucket/run/a") == b"A" and "b" not in names(memory)
    store.pipe("/bucket/run/a", b"other")
    (copy.local / "left over").write_text("never saved there")
    copy.pull()
    assert (copy.local / "a").read_text() == "other" and not (copy.local / "left over").exists()


def test_a_run_lives_in_a_store(memory, tiny_arguments, tmp_path, capsys):
    """Trained, lost on this machine, gone on with, evaluated, begun from and exported."""
    assert train.main([*tiny_arguments(SMALL), f"--workdir={memory}"]) == 0
    said = capsys.readouterr().out
    assert (
        f"longer training: python -m quweit_jax.train --workdir={memory} --config.steps=8" in said
    )
    found = names(memory)
    assert {"config.json", "metrics.jsonl", "checksums/4.json", "plots/loss.png"} <= found
    (tmp_path / "cache").rename(tmp_path / "gone")
    assert train.main([f"--workdir={memory}", "--config.steps=8"]) == 0
    rows = [
        json.loads(line)
        for line in fsspec.open(f"{memory}/metrics.jsonl").open().read().split(b"\n")
        if line
    ]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 9))
    assert {name.split("/")[1] for name in names(memory) if name.startswith("checkpoints/")} == {
        "6",
        "8",
    }, "what is no longer kept is gone there, too"
    capsys.readouterr()
    assert evaluate.main([f"--workdir={memory}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] in (4, 8)
    new = f"--workdir={tmp_path / 'new'}"
    assert train.main([*tiny_arguments(SMALL), new, f"--config.init_from={memory}"]) == 0
    out = memory.replace("/run", "/out/model.stablehlo")
    arguments = [f"--workdir={memory}", f"--out={out}", "--platforms=cpu"]
    assert export.main(arguments) == 0
    assert f"wrote {out}: " in capsys.readouterr().out
    store = fsspec.filesystem("memory")
    assert store.size("/bucket/out/model.stablehlo") > 1000
    assert json.loads(store.cat("/bucket/out/model.json"))["training_step"] in (4, 8)
    with pytest.raises(InputError, match=r"--out: .* exists; give another name, or --overwrite"):
        export.main(arguments)
    folder = memory.replace("/run", "/packed")
    assert pack.main([f"--workdir={memory}", f"--out={folder}", "--trained"]) == 0
    assert names(folder) == {"model.json", "model.safetensors", "tokenizer.json"}
    with pytest.raises(InputError, match=r"--out: .* holds a model already"):
        pack.main([f"--workdir={memory}", f"--out={folder}", "--trained"])
    assert generate.main([f"--model={folder}", "--max_tokens=2", "--prompt=a"]) == 0


@pytest.mark.usefixtures("compile_quickly")
def test_data_live_in_a_store(memory, tiny_arguments, tmp_path, monkeypatch):
    """A text and a folder of documents; what is brought again is known as the same data."""
    text = "".join(f"{i} and so on\n" for i in range(400))
    store, data = fsspec.filesystem("memory"), "memory://bucket/data"
    lines = [json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(8)]
    store.pipe({"/bucket/data/text.txt": text.encode()})
    store.pipe({f"/bucket/data/set/{i}.jsonl": line.encode() for i, line in enumerate(lines)})
    documents = {"data.source": "document_folder", "data.tokenizer": "byte"}
    for name, values in (("text.txt", {}), ("set", documents)):
        workdir = f"--workdir={tmp_path / name}"
        given = SMALL | values | {"data.path": f"{data}/{name}"}
        assert train.main([*tiny_arguments(given), workdir]) == 0
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
        assert train.main([workdir, "--config.steps=6"]) == 0
    with pytest.raises(InputError, match=r"data.path: nothing at memory://bucket/data/none"):
        train.main([*tiny_arguments(SMALL | {"data.path": f"{data}/none"}), f"{workdir}-2"])
    with pytest.raises(InputError, match=r"expected a file or folder of this machine.*copy runs"):
        report.main(["s3://bucket/run", f"--out={tmp_path / 'report'}"])


def test_what_a_store_refuses_is_a_sentence(memory, tiny_arguments, monkeypatch):
    with pytest.raises(InputError, match=r"--workdir: nothing at memory://bucket/none"):
        evaluate.main(["--workdir=memory://bucket/none"])

    def full(self, *_):
        raise OSError("the quota is used up")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", full)
    with pytest.raises(RunError, match=r"cannot be written .*quota.*; what was written is in"):
        train.main([*tiny_arguments(SMALL), f"--workdir={memory}"])
    monkeypatch.setitem(stores._SERVED, "memory", "s3fs")
    if importlib.util.find_spec("s3fs") is None:
        with pytest.raises(InputError, match=r"the package s3fs for --workdir=.*quweit_jax\[s3\]"):
            train.main([*tiny_arguments(SMALL), f"--workdir={memory}"])


@pytest.fixture(scope="module")
def emulators():
    """The environment in which gs://bucket and s3://bucket are there, on this machine."""
    for package in ("gcsfs", "s3fs", "boto3"):
        pytest.importorskip(package, reason="the extras gcs and s3 are not installed")
    google = pytest.importorskip("gcp_storage_emulator.server")
    moto = pytest.importorskip("moto.server")
    ports = free_port(), free_port()
    one = google.create_server("localhost", ports[0], in_memory=True, default_bucket="bucket")
    one.start()
    other = moto.ThreadedMotoServer(port=ports[1])
    other.start()
    environment = {
        "STORAGE_EMULATOR_HOST": f"http://localhost:{ports[0]}",
        "AWS_ENDPOINT_URL": f"http://localhost:{ports[1]}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import boto3

    boto3.client(
        "s3",
        **{"endpoint_url": environment["AWS_ENDPOINT_URL"]},
        aws_access_key_id="none",
        aws_secret_access_key="none",
        region_name="us-east-1",
    ).create_bucket(Bucket="bucket")
    yield environment
    other.stop()
    one.stop()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_kills_lose_nothing(emulators, tiny_arguments, tmp_path, scheme, monkeypatch, capsys):
    """Killed five times, each time on another machine, it ends as a run left alone; it can be
    evaluated and exported there, and its data were there, too.
    """
    for name, value in emulators.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("QUWEIT_NATIVE", "0")  # each machine would compile it anew
    write_text(tmp_path / "text.txt")
    folder = f"{scheme}://bucket/{tmp_path.name}"
    store, root = fsspec.core.url_to_fs(folder, skip_instance_cache=True)
    store.put_file(str(tmp_path / "text.txt"), f"{root}/data/text.txt")
    values = SMALL | {"steps": 16, "eval_every": 16}
    alone = values | {"data.path": tmp_path / "text.txt"}
    assert train.main([*tiny_arguments(alone), f"--workdir={tmp_path / 'alone'}"]) == 0
    address, kills = f"{folder}/run", 0
    values["data.path"] = f"{folder}/data/text.txt"
    command = [sys.executable, "-m", "quweit_jax.train", *tiny_arguments(values)]
    for attempt in range(30):
        machine = tmp_path / f"machine-{attempt}"
        own = {"JAX_NUM_CPU_DEVICES": "1", "XDG_CACHE_HOME": str(machine)}
        process = subprocess.Popen(
            [*command, f"--workdir={address}"], cwd=REPOSITORY, env=os.environ | own
        )
        while process.poll() is None and kills < 5:
            time.sleep(0.02)
            steps = [int(p.stem) for p in machine.rglob("checksums/*.json") if p.stem.isdigit()]
            # Once it has saved something of its own, at some time around the next save.
            if max(steps, default=0) >= 2 * (kills + 1):
                time.sleep(0.03 * kills)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        if process.wait() == 0:
            break
    assert process.returncode == 0 and kills == 5
    expected = metrics.read_rows(tmp_path / "alone" / "metrics.jsonl")
    found = metrics.read_rows(next(machine.rglob("run/metrics.jsonl")))
    kept = ("step", "split", "loss", "grad_norm")
    assert [[row.get(k) for k in kept] for row in found] == [
        [row.get(k) for k in kept] for row in expected
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    capsys.readouterr()
    assert evaluate.main([f"--workdir={address}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert evaluate.main([f"--workdir={tmp_path / 'alone'}", "--json"]) == 0
    assert (told["step"], told["loss"]) == (16, json.loads(capsys.readouterr().out)["loss"])
    out = f"{folder}/model.stablehlo"
    assert export.main([f"--workdir={address}", f"--out={out}", "--platforms=cpu"]) == 0
    store.invalidate_cache()
    assert json.loads(store.cat_file(f"{root}/model.json"))["training_step"] == 16
    assert store.size(f"{root}/model.stablehlo") > 1000


SHELF = """
import sys
from fsspec import register_implementation
from fsspec.implementations.local import LocalFileSystem
from quweit_jax.commands import cli, train
from quweit_jax.training import stores

class Shelf(LocalFileSystem):
    protocol = "shelf"

    def __init__(self, **options):
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(path.replace("shelf://", {root!r}, 1))

register_implementation("shelf", Shelf)
stores._SERVED["shelf"] = "fsspec"
if __name__ == "__main__":
    cli.run(train.main)
"""


@pytest.mark.usefixtures("compile_quickly")
def test_several_hosts_need_no_folder_that_all_reach(tiny_config, tiny_arguments, tmp_path):
    """Two processes with folders of their own and one store, parameters divided over both; others,
    whose folders are empty, go on where they ended.
    """
    (tmp_path / "store").mkdir()
    program = tmp_path / "program.py"
    program.write_text(SHELF.format(root=f"{tmp_path}/store/"))
    values = SMALL | {"mesh.data": 1, "mesh.fsdp": 2, "eval_every": 2}
    for steps, machines in ((2, "ab"), (4, "cd")):
        shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
        shared |= {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(REPOSITORY), "QUWEIT_NATIVE": "0"}
        command = [sys.executable, str(program), *tiny_arguments(values | {"steps": steps})]
        processes = []
        for i, machine in enumerate(machines):
            own = {"JAX_PROCESS_ID": str(i), "XDG_CACHE_HOME": str(tmp_path / machine)}
            processes.append(
                subprocess.Popen(
                    [*command, "--workdir=shelf://bucket/run"],
                    cwd=REPOSITORY,
                    env=os.environ | shared | own,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said = [process.communicate(timeout=300) for process in processes]
        errors = [line for _, text in said for line in text.splitlines() if "error" in line]
        assert [process.returncode for process in processes] == [0, 0], errors
    run = tmp_path / "store" / "bucket" / "run"
    assert "where step 2 is saved" in said[0][0]
    for steps in (2, 4):  # as rates depend on them
        loop.fit(tiny_config(SMALL | {"eval_every": 2, "steps": steps}), tmp_path / "one")
    found, expected = (
        {(row["step"], row["split"]): row["loss"] for row in metrics.read_rows(where)}
        for where in (run / "metrics.jsonl", tmp_path / "one" / "metrics.jsonl")
    )
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == 6
    found, expected = read_checkpoint(run), read_checkpoint(tmp_path / "one")
    for name in expected:
        if name.startswith("state/params"):
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)
