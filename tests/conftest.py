"""What the tests share: the golden files, a small text, and a run small enough to train in seconds.

Tests see 8 host CPU devices, so that sharding is tested on any machine; a config must therefore say
how many it takes, and `tiny_config` takes one.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from quweit_jax.config import set_value
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config

REPOSITORY = Path(__file__).resolve().parent.parent
os.environ.setdefault("MPLBACKEND", "Agg")
# Most of the tests' time is compilation, here and in the processes they start, and none of them
# measures speed. The fusion emitters alone take a third of it; later XLA ends the process where it
# is told to do without them.
_WITHOUT_EMITTERS = jax.__version_info__ < (0, 11)
COMPILE_QUICKLY = (
    *(("--xla_cpu_use_fusion_emitters=false",) if _WITHOUT_EMITTERS else ()),
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join((*COMPILE_QUICKLY, os.environ.get("XLA_FLAGS", "")))
jax.config.update("jax_num_cpu_devices", 8)

# A whole run, small enough to train in a second after compiling.
TINY = {
    "steps": 20,
    "batch_size": 8,
    "log_every": 5,
    "eval_every": 10,
    "eval_batches": 2,
    "eval_batch_size": 8,
    "checkpoint_every": 5,
    "sample_tokens": 0,
    "data.source": "text_file",
    "data.limit_bytes": 0,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup": 2,
    "mesh.data": 1,
    "model.layers": 2,
    "model.heads": 2,
    "model.width": 32,
    "model.context": 16,
    "model.mlp": "weightless",
    "model.weightless.num_luts": 48,
}


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one test has compiled, the next ones read, in every worker and started process.

    JAX_COMPILATION_CACHE_DIR, where set, is used instead of a folder made for this run.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers' common folder, new in every run
    settings = {
        "jax_compilation_cache_dir": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(folder / "compiled")
        ),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in (settings | {"jax_persistent_cache_min_entry_size_bytes": -1}).items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """For modules that spend their time compiling: here and in the processes started from here the
    compiler leaves out its optimizations.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden files of published models: $QUWEIT_SHARED, or `shared` beside the
    repository.
    """
    folder = Path(os.environ.get("QUWEIT_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(
            "the golden files are not there: set QUWEIT_SHARED to the folder that holds golden/"
        )
    return folder


def write_text(
    path: Path, seed: int = 0, words: int = 800, alphabet: str = "abcdefghijklmnopqrstuvwxyz"
) -> Path:
    """A text of made-up words; the same seed gives the same text."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices(alphabet, k=draw.randint(2, 7))) for _ in range(60)]
    path.write_text(" ".join(draw.choices(vocabulary, k=words)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of a few KB in lower-case letters, spaces and one line end."""
    return write_text(tmp_path_factory.mktemp("text") / "tiny.txt")


@pytest.fixture(scope="session")
def tiny_values(tiny_text: Path) -> Callable[..., dict[str, Any]]:
    """`tiny_values({'steps': 3})`: the config paths and values of a tiny run, with changes."""
    return lambda changes=None: TINY | {"data.path": str(tiny_text)} | (changes or {})


@pytest.fixture(scope="session")
def tiny_config(tiny_values) -> Callable[..., Any]:
    """`tiny_config({'model.mlp': 'dense'})`: a complete config of a tiny GPT on `tiny_text`, for
    `training.loop.fit`.
    """

    def make(changes: dict[str, Any] | None = None) -> Any:
        config = base_config()
        config.model = defaults("gpt")
        for path, value in tiny_values(changes).items():
            set_value(config.lock(), path, str(value))
        return config.lock()

    return make


@pytest.fixture(scope="session")
def tiny_arguments(tiny_values) -> Callable[..., list[str]]:
    """`tiny_arguments({'steps': 3})`: the same run for a command line: ['--config=...:quick',
    '--config.steps=3', ...].
    """

    def make(changes: dict[str, Any] | None = None) -> list[str]:
        experiment = REPOSITORY / "experiments" / "configs" / "gpt_char.py"
        return [
            f"--config={experiment}:quick",
            *(f"--config.{path}={value}" for path, value in tiny_values(changes).items()),
        ]

    return make


def read_checkpoint(workdir: Path, step: int | None = None) -> dict[str, Any]:
    """A checkpoint (the newest) as it lies on disk, one array a path: 'state/params/...', and
    'step', 'data' (the iterator's state).
    """
    from orbax.checkpoint import v1 as ocp

    from quweit_jax.training.sharding import path_name

    if step is None:
        step = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    folder, here = (
        workdir / "checkpoints" / str(step),
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    found = ocp.checkpointables_metadata(folder).metadata["state"]
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        found,
        is_leaf=lambda x: hasattr(x, "shape"),
    )
    saved = ocp.load_checkpointables(folder, {"state": abstract, "loop": None})
    leaves = {
        path_name(p): np.asarray(x)
        for p, x in jax.tree_util.tree_leaves_with_path({"state": saved["state"]})
    }
    return leaves | {"step": step, "data": json.loads(saved["loop"]["json"].tobytes())["data"]}


def assert_same_checkpoint(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit: parameters, wiring, optimizer, average, random key, step and the data iterator's
    place.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), (
                name
            )
        else:
            assert found[name] == value, name
