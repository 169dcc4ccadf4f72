"""The same training on a mesh of 8 devices as on one, with large parameters spread out from the
first moment.
"""

from __future__ import annotations

import json
import signal

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from quweit_jax.commands import train
from quweit_jax.config import load_module
from quweit_jax.errors import InputError
from quweit_jax.training import loop, metrics, rundir, sharding, state
from quweit_jax.training.setup import assemble
from tests.conftest import REPOSITORY

MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.fsdp_size_limit": 256}

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices; on a CPU the tests make them"
)


def train_losses(config, workdir) -> np.ndarray:
    loop.fit(config, workdir)
    return np.asarray(metrics.curve(metrics.read_rows(workdir / "metrics.jsonl"), "train")[1])


@pytest.mark.parametrize("mlp", ["dense", "weightless"])
def test_a_mesh_of_eight_gives_the_losses_of_one_device(tiny_config, tmp_path, mlp):
    values = {
        "model.mlp": mlp,
        "log_every": 1,
        "checkpoint_every": 20,
        "eval_every": 20,
        "model.layers": 2,
        # Of some seeds, 0 and 3 among the first six, a bit lies so near its threshold that sums in
        # another order turn it over, and the losses are then 5e-4 apart.
        "seed": 1,
    }
    one = train_losses(tiny_config(values), tmp_path / "one")
    eight = train_losses(tiny_config(values | MESH), tmp_path / "eight")
    assert one.shape == (20,) and len(np.unique(one)) == 20
    np.testing.assert_allclose(eight, one, atol=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        {"model.mlp": "dense"},
        {"model.mlp": "weightless"},
        {"model.weightless.mapping": "learnable"},
    ],
)
def test_no_large_array_lies_whole_on_a_device(tiny_config, model):
    parts = assemble(tiny_config(MESH | model | {"optimizer.ema": 0.9, "model.layers": 1}))
    abstract = parts.abstract_state()
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    large = [(sharding.path_name(path), leaf) for path, leaf in leaves if leaf.size > 256]
    assert len(large) > 10
    for name, leaf in large:
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) < leaf.size, (
            f"{name} {leaf.shape} is replicated"
        )
    moments = [leaf.sharding.spec for name, leaf in large if name.endswith("qkv/kernel")]
    assert len(moments) == 4 and set(moments) == {P("fsdp", "tensor")}, (
        "parameter, two moments and average lie alike"
    )


def test_the_first_state_is_made_in_its_place(tiny_config, monkeypatch):
    """Only shapes are computed before the shardings are known; what the compiled initialization
    returns lies on them already.
    """
    parts = assemble(tiny_config(MESH | {"model.layers": 1}))
    made = []
    jit = jax.jit

    def watch(function, **options):
        made.append(options.get("out_shardings"))
        return jit(function, **options)

    monkeypatch.setattr(state.jax, "jit", watch)
    first = parts.init_state()
    assert len(made) == 1 and made[0] is not None
    expected = parts.abstract_state()
    jax.tree.map(
        lambda x, e: np.testing.assert_equal(
            (x.shape, x.dtype, x.sharding), (e.shape, e.dtype, e.sharding)
        ),
        first,
        expected,
    )


def test_the_first_state_does_not_depend_on_the_mesh(tiny_config):
    one, eight = (
        assemble(tiny_config(mesh | {"model.layers": 1})).init_state() for mesh in ({}, MESH)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        jax.device_get(one),
        jax.device_get(eight),
    )


def test_errors_name_what_to_change(tiny_config):
    with pytest.raises(
        InputError,
        match=r"batch_size: 8 cannot be divided over 3 devices .* use 6 or 9, or a smaller "
        r"--config.mesh.data",
    ):
        assemble(tiny_config({"mesh.data": 3}))
    with pytest.raises(
        InputError, match=r"batch_size / grad_accum: 2 cannot be divided over 4 devices"
    ):
        assemble(tiny_config({"mesh.data": 4, "grad_accum": 4}))
    with pytest.raises(
        InputError,
        match=r"mesh: data=4 x fsdp=4 x tensor=1 needs 16 devices, found 8; change --config.mesh",
    ):
        assemble(tiny_config({"mesh.data": 4, "mesh.fsdp": 4, "batch_size": 16}))
    with pytest.raises(InputError, match=r"mesh: expected positive sizes and at most one -1"):
        assemble(tiny_config({"mesh.data": 0}))


def test_rules():
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    assert sharding.spec_for("params/block_0/attention/qkv/kernel", (32, 96), mesh, 0) == P(
        "fsdp", "tensor"
    )
    assert sharding.spec_for("params/block_0/mlp/luts_0/tables", (48, 16), mesh, 0) == P(
        ("tensor", "fsdp"), None
    )
    assert sharding.spec_for("params/block_0/mlp/luts_0/tables", (46, 16), mesh, 0) == P(
        "tensor", None
    ), "what 4 does not divide, 2 may"
    assert sharding.spec_for("constants/wiring/mapping", (48, 4), mesh, 1000) == P(None, None), (
        "small arrays stay whole"
    )
    assert sharding.spec_for("constants/wiring/mapping", (48, 4), mesh, 100) == P("fsdp", None), (
        "an array without a rule is divided when large"
    )
    assert sharding.spec_for("params/bias", (7,), mesh, 100) == P(None)
    with pytest.raises(
        InputError,
        match=r"params/odd \[7, 9\] is above mesh.fsdp_size_limit = 10 but no dimension divides by "
        r"fsdp = 2",
    ):
        sharding.spec_for("params/odd", (7, 9), mesh, 10)


@pytest.mark.parametrize(
    ("mesh", "batch", "count", "expected"),
    [
        ({}, 12, 8, (6, 1, 1)),
        ({}, 12, 5, (4, 1, 1)),
        ({}, 7, 6, (1, 1, 1)),
        ({"data": 1, "fsdp": -1}, 256, 7, (1, 4, 1)),
        ({"fsdp": 2}, 12, 8, (3, 2, 1)),
        ({"tensor": 4}, 3, 8, (1, 1, 4)),
        ({"data": 1, "tensor": -1}, 3, 7, (1, 1, 7)),
        ({}, 0, 7, (7, 1, 1)),
    ],
)
def test_a_free_axis_takes_what_the_batch_allows(mesh, batch, count, expected):
    made = sharding.make_mesh(sharding.MeshConfig(**mesh), jax.devices()[:count], batch)
    assert tuple(made.shape.values()) == expected
    assert list(made.devices.flat) == jax.devices()[: made.size]


def test_every_variant_has_a_mesh_on_one_to_eight_devices():
    """`make train` and each variant by itself, without an option."""
    found = 0
    for file in sorted((REPOSITORY / "experiments" / "configs").glob("[!_]*.py")):
        module, _ = load_module(str(file))
        for variant in getattr(module, "VARIANTS", None) or [None]:
            config = module.get_config(variant)
            mesh = sharding.MeshConfig(**config.mesh.to_dict())
            batch = config.batch_size // config.grad_accum
            for count in range(1, 9):
                made = sharding.make_mesh(mesh, jax.devices()[:count], batch)
                sharding.check_batch(batch, made)
                # No fewer than half of the devices work, should the batch divide at all.
                assert made.size >= min(count / 2, batch)
            found += 1
    assert found > 15


def test_a_run_goes_on_on_eight_two_one_and_four_devices(tiny_config, tmp_path, capsys):
    """Its losses are those of a run that was left alone."""
    values = {"model.layers": 1, "model.mlp": "dense", "log_every": 1, "steps": 8} | {
        "eval_every": 8,
        "checkpoint_every": 2,
    }
    alone = train_losses(tiny_config(values), tmp_path / "alone")
    for count, last in zip((8, 2, 1, 4), (2, 4, 6, 8)):
        config = tiny_config(values | {"mesh.data": -1})

        def stop(step, last=last):
            if step == last:
                signal.raise_signal(signal.SIGTERM)

        here = sharding.MeshConfig(data=count)
        setups = []
        given = {"on_step": stop, "mesh": here, "announce": setups.append, "progress": False}
        assert loop.fit(config, tmp_path / "run", **given).step == last
        assert setups[0].mesh.size == count
    train.announce(setups[0], tmp_path / "run")
    assert "4 of 8 devices stay idle: 8 examples at a time are divided over data 4" in (
        capsys.readouterr().out
    )
    losses = metrics.curve(metrics.read_rows(tmp_path / "run" / "metrics.jsonl"), "train")[1]
    np.testing.assert_allclose(losses, alone, atol=1e-5)
    assert rundir.read_config(tmp_path / "run").mesh.data == -1, "the run's own mesh is kept"


def test_a_mesh_that_is_too_large_here_keeps_no_run_from_going_on(tiny_arguments, tmp_path):
    """Without --config the saved mesh is a wish; what a person gives is not."""
    small = {"model.layers": 1, "model.mlp": "none", "steps": 2, "eval_every": 2} | {
        "checkpoint_every": 2
    }
    where = f"--workdir={tmp_path / 'run'}"
    assert train.main([*tiny_arguments(small), where]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    saved["mesh"] |= {"data": 16, "fsdp": 4}
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    assert train.main([where, "--config.steps=4"]) == 0
    with pytest.raises(InputError, match="mesh: data=16 x fsdp=1"):
        train.main([where, "--config.steps=6", "--config.mesh.data=16", "--config.mesh.fsdp=1"])
