"""Files that are whole or not there, and the lock of a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from quweit_jax.errors import InputError
from quweit_jax.training import files
from tests.conftest import REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from quweit_jax.training import files
with files.exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has locked `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_is_one_process_s_until_it_ends(tmp_path, holder):
    assert files.in_use(tmp_path)
    with pytest.raises(InputError, match="--workdir"), files.exclusive(tmp_path, patience=0):
        raise AssertionError("both have it")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not files.in_use(tmp_path), "a lock ends with its process, however that ends"
    with files.exclusive(tmp_path, patience=5):
        assert files.in_use(tmp_path)
    assert not files.in_use(tmp_path)


def test_it_waits_for_a_process_that_is_just_ending(tmp_path, holder):
    timer = threading.Timer(0.5, holder.kill)
    timer.start()
    with files.exclusive(tmp_path):
        assert holder.wait(timeout=5) == -signal.SIGKILL
    timer.join()


def test_looking_writes_nothing(tmp_path):
    assert not files.in_use(tmp_path) and not files.in_use(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), files.exclusive(tmp_path):
        raise KeyError("x")
    with files.exclusive(tmp_path, patience=0):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_nothing_can_be_locked_no_file_pretends_to_be_a_lock(tmp_path, monkeypatch, number):
    """It would outlive a process that is killed, and keep everybody out."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with files.exclusive(tmp_path, patience=0):
            assert not files.in_use(tmp_path)
            with files.exclusive(tmp_path, patience=0):
                pass
    assert all(path.stat().st_size == 0 for path in tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_not_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with files.exclusive(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_and_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, order = tmp_path / "value.json", []
    files.replace_json(path, {"before": 1})
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(files.os, "fsync", lambda d: (order.append("sync"), sync(d))[1])
    monkeypatch.setattr(Path, "replace", lambda p, t: (order.append("name"), replace(p, t))[1])
    files.replace_json(path, {"name": "é"})
    assert order == ["sync", "name", "sync"]
    assert path.read_text(encoding="utf-8") == '{\n  "name": "é"\n}\n'

    def fail(*_):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        files.replace_text(path, "other")
    assert path.read_text(encoding="utf-8") == '{\n  "name": "é"\n}\n'


def test_what_lies_where_a_file_is_made_is_never_written_to(tmp_path):
    """A pipe would wait for a reader, a link lead to another's file."""
    other = tmp_path / "other.txt"
    other.write_text("mine")
    for number, make in enumerate((os.mkfifo, lambda path: path.symlink_to(other))):
        path = tmp_path / f"{number}.json"
        make(path.with_suffix(".tmp"))
        files.replace_json(path, {"a": 1})
        assert path.read_text() == '{\n  "a": 1\n}\n' and not path.is_symlink()
    assert other.read_text() == "mine"


def test_a_pipe_in_a_folder_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / files.LOCK)
    assert not files.in_use(tmp_path)
    files.sync(tmp_path / files.LOCK)
