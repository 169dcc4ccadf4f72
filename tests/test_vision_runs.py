"""Vision runs from the command line, on a folder of made-up images: train, go on, evaluate, deploy,
fine-tune, compile.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from quweit_jax.commands import evaluate, train
from quweit_jax.errors import InputError
from quweit_jax.training import loop, rundir
from tests.conftest import REPOSITORY, assert_same_checkpoint, read_checkpoint

pytestmark = pytest.mark.usefixtures("compile_quickly")

CLASSES = {"blue": (30, 60, 200), "green": (40, 200, 60), "red": (220, 50, 40)}
TINY = [
    "--config.data.image_size=8",
    "--config.data.normalize=half",
    "--config.model.variant=mu/4",
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.model.heads=2",
    "--config.model.weightless.num_luts=24",
    "--config.model.drop_path=0.1",
    "--config.batch_size=8",
    "--config.eval_batch_size=8",
    "--config.log_every=2",
    "--config.eval_every=4",
    "--config.checkpoint_every=4",
    "--config.keep=5",
    "--config.mesh.data=1",
    "--config.data.augment.mixup=0.8",
    "--config.data.augment.cutmix=1.0",
    "--config.data.augment.label_smoothing=0.1",
    "--config.data.augment.erasing=0.25",
]
# Everything of a configuration (pixels, width, augmentation, dtype, rates) but its depth and
# batches.
SHALLOW = [
    "--config.model.depth=1",
    "--config.batch_size=2",
    "--config.eval_batch_size=2",
    "--config.eval_batches=1",
    "--config.mesh.data=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 noisy images of three colors, two fifths of each class for validation."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, color in CLASSES.items():
        for split, count in (("train", 12), ("validation", 8)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.asarray(color) + rng.normal(0, 40, (8, 8, 3)), 0, 255).astype(
                    np.uint8
                )
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def arguments(
    folder, workdir, *extra, variant="quick,mlp=weightless,integer=True,steps=8", size=TINY
):
    return [
        f"--config={REPOSITORY / 'experiments/configs/vit_cifar.py'}:{variant}",
        f"--workdir={workdir}",
        "--config.data.source=image_folder",
        f"--config.data.path={folder}",
        *size,
        *extra,
    ]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A finished run of an integer-only weightless ViT."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(arguments(folder, workdir)) == 0
    return workdir


def score(capsys, *argv):
    assert evaluate.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_ranges_are_trained_and_saved(trained):
    saved = read_checkpoint(trained)
    ranges = {name: value for name, value in saved.items() if "/ranges/" in name}
    assert len(ranges) == 2 * 14 and all(value != 0 for name, value in ranges.items())


def test_interrupted_run_goes_on_to_the_same_bits(trained, tmp_path):
    """Stopped by an exception at step 6, after the checkpoint of step 4."""
    assert read_checkpoint(trained, 4)["step"] == 4
    config = rundir.read_config(trained)

    class Cut(Exception):
        pass

    def stop(step):
        if step == 6:
            raise Cut

    with pytest.raises(Cut):
        loop.fit(config, tmp_path / "again", progress=False, on_step=stop)
    loop.fit(config, tmp_path / "again", progress=False)
    assert_same_checkpoint(read_checkpoint(tmp_path / "again"), read_checkpoint(trained))


def test_reloaded_accuracy_is_the_same_to_the_last_image(trained, capsys):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "validation"][-1]
    found = score(capsys, f"--workdir={trained}", "--step=8")
    assert found["accuracy"] == last["accuracy"] and found["loss"] == pytest.approx(
        last["loss"], rel=1e-6
    )
    assert found["count"] == 24


def test_deployed_form_decides_the_same(trained, capsys):
    plain, deployed = (
        score(capsys, f"--workdir={trained}", "--step=8", *extra) for extra in ((), ("--packed",))
    )
    assert deployed["form"] == "integer" and deployed["accuracy"] == plain["accuracy"]
    assert 0 < deployed["model_bytes"] < 20_000


def test_fine_tuning_from_a_float_run(folder, trained, tmp_path, capsys):
    assert train.main(arguments(folder, tmp_path / "float", variant="quick,mlp=dense,steps=4")) == 0
    capsys.readouterr()
    tune = arguments(
        folder,
        tmp_path / "tuned",
        f"--config.init_from={tmp_path / 'float'}",
        variant="quick,mlp=dense,integer=True,steps=1",
    )
    assert (
        train.main(
            [*tune, "--config.optimizer.learning_rate=1e-12", "--config.optimizer.weight_decay=0"]
        )
        == 0
    )
    assert "init_from:" in capsys.readouterr().out
    before, after = read_checkpoint(tmp_path / "float"), read_checkpoint(tmp_path / "tuned")
    for name in before:
        if name.startswith("state/params/"):
            np.testing.assert_allclose(after[name], before[name], atol=1e-6)


def test_init_from_errors(folder, tmp_path):
    with pytest.raises(InputError, match="init_from: nothing at nowhere"):
        train.main(arguments(folder, tmp_path / "x", "--config.init_from=nowhere"))
    assert not (tmp_path / "x").exists()
    config = rundir.read_config(_written_config(folder, tmp_path))
    with pytest.raises(InputError, match=r"init_from: loop\.fit needs initial="):
        loop.fit(config, tmp_path / "y")


def test_a_run_goes_on_without_its_source(folder, tmp_path):
    """What a run began from is only needed to begin it."""
    source, workdir = tmp_path / "source", tmp_path / "run"
    assert train.main(arguments(folder, source, variant="quick,mlp=none,steps=1")) == 0
    assert (
        train.main(
            arguments(
                folder, workdir, f"--config.init_from={source}", variant="quick,mlp=none,steps=1"
            )
        )
        == 0
    )
    shutil.rmtree(source)
    assert train.main(["--workdir", str(workdir), "--config.steps=2"]) == 0
    assert loop.fit(rundir.read_config(workdir), workdir).step == 2


def _written_config(folder, tmp_path):
    workdir = tmp_path / "written"
    assert train.main(arguments(folder, workdir, variant="quick,mlp=none,steps=1")) == 0
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"init_from": "elsewhere"}))
    return workdir


def test_data_parallel_ranges_are_global(folder, trained, tmp_path):
    """Two devices see the same ranges and losses as one."""
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    assert train.main([*arguments(folder, tmp_path / "two"), "--config.mesh.data=2"]) == 0
    one, two = (read_checkpoint(d, 4) for d in (trained, tmp_path / "two"))
    for name in one:
        if "/ranges/" in name:
            np.testing.assert_allclose(two[name], one[name], rtol=0.02)


def test_bad_images_are_named_or_skipped(folder, tmp_path, capsys):
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    Image.new("L", (8, 8)).save(damaged / "validation" / "red" / "3.png")
    with pytest.raises(InputError, match=r"red.3\.png.*skip_bad=True"):
        train.main(arguments(damaged, tmp_path / "run", variant="quick,mlp=none,steps=4"))
    capsys.readouterr()
    assert (
        train.main(
            [
                *arguments(damaged, tmp_path / "kept", variant="quick,mlp=none,steps=4"),
                "--config.data.skip_bad=True",
            ]
        )
        == 0
    )
    assert "left out" in capsys.readouterr().out
    assert score(capsys, f"--workdir={tmp_path / 'kept'}")["count"] == 23


@pytest.mark.parametrize("variant", ["paper", "gpu", "gpu,mlp=weightless"])
def test_the_large_variants_step(folder, tmp_path, capsys, variant):
    workdir = tmp_path / "run"
    assert train.main(arguments(folder, workdir, variant=f"{variant},steps=2", size=SHALLOW)) == 0
    loss = float(capsys.readouterr().out.split("validation loss ")[1].split(",")[0])
    assert 0 < loss < 20, "finite, and of the size of a guess"
    assert score(capsys, f"--workdir={workdir}")["count"] == 24
