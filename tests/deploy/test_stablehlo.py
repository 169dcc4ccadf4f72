"""`deploy.stablehlo` and its command: programs that run without this project, and give what the
models give.

One process that cannot import the project calls every program there is; the tests compare what it
found.
"""

import json
import os
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.commands import export
from quweit_jax.config import to_dict
from quweit_jax.deploy import generate, stablehlo
from quweit_jax.deploy.pack import pack, stored_bytes
from quweit_jax.errors import InputError
from quweit_jax.ops.kernels import choice
from quweit_jax.training import loop, rundir
from tests.compiled import quick_jit

pytestmark = pytest.mark.usefixtures("compile_quickly")

BATCHES = (1, 3, 5)
VOCABULARY, CONTEXT = 11, 8
WEIGHTLESS = {"num_luts": 16, "lut_inputs": 3, "thermometer_bits": 2, "vector_init": 0.3}
LANGUAGE = {
    "context": CONTEXT,
    "width": 8,
    "layers": 1,
    "mlp": "weightless",
    "weightless": WEIGHTLESS,
}
VIT = {"name": "vit", "variant": "mu/4", "width": 8, "mlp": "weightless", "weightless": WEIGHTLESS}
# Name -> (model, forms).
MODELS = {
    "gpt": (
        {
            "name": "gpt",
            "heads": 2,
            "dtype": "bfloat16",
            **LANGUAGE,
            "layers": 2,
            "mlp": "dense+weightless",
        },
        ("trained", "packed"),
    ),
    "matmulfree": (
        {"name": "matmulfree", "hidden": 12, **LANGUAGE, "mlp": "dense"},
        ("trained", "packed", "step"),
    ),
    "transformer_pp": (
        {"name": "transformer_pp", "heads": 2, "hidden": 12, **LANGUAGE},
        ("trained",),
    ),
    "vit": (VIT, ("trained",)),
    "vit_integer": (VIT | {"integer": True}, ("packed",)),
    "dwn": (
        {"name": "dwn", "num_luts": (32,), "lut_inputs": 3, "thermometer_bits": 2},
        ("trained",),
    ),
}
CPU = {**os.environ, "JAX_PLATFORMS": "cpu"}
CASES = [(name, form) for name, (_, forms) in MODELS.items() for form in forms]

# Calls programs with inputs from `asked.json`; the project and what it is made of cannot be
# imported.
STRANGER = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("quweit_jax", "flax", "optax", "orbax", "ml_collections"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
try:
    import quweit_jax
    sys.exit("the project can be imported")
except ModuleNotFoundError:
    pass
import jax, jax.export
import numpy as np

jax.config.update("jax_disable_most_optimizations", True)
found = {}
for name, calls in json.load(open("asked.json")).items():
    with open(name + ".stablehlo", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    inputs = np.load(name + ".npy")
    if name.endswith("-step"):
        about = json.load(open(name + ".json"))
        fill = lambda s: np.zeros([len(inputs) if n == "b" else n for n in s["shape"]], s["dtype"])
        state, logits = jax.tree.map(fill, about["state"], is_leaf=lambda s: "dtype" in s), []
        for t in range(inputs.shape[1]):
            out, state = program.call(inputs[:, t : t + 1], state)
            logits.append(out)
        found[name] = np.stack(logits, 1)
        continue
    parts = [inputs[:b, :t] if t else inputs[:b] for b, t in calls]
    every = jax.jit(lambda *each: [program.call(x) for x in each])(*parts)
    found |= {f"{name} {i}": result for i, result in enumerate(every)}
np.savez("found.npz", **found)
assert "quweit_jax" not in sys.modules and "flax" not in sys.modules
"""


def make(values, seed=0):
    """A model with variables of no special values, and inputs of the largest batch."""
    rng = np.random.default_rng(seed)
    is_language = "context" in values
    model = stablehlo.portable(models.build(values, VOCABULARY if is_language else 4))
    largest = BATCHES[-1]
    if is_language:
        inputs = rng.integers(0, VOCABULARY, (largest, CONTEXT)).astype(np.int32)
    else:
        shape = (8, 8, 3) if values["name"] == "vit" else (6,)
        inputs = rng.normal(size=(largest, *shape)).astype(np.float32)

    def drawn(path, leaf):  # initializing would have to be compiled
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(0, 6, leaf.shape).astype(leaf.dtype)
        value = {"min": -3.0, "max": 3.0, "scale": 1.0, "norm_scale": 1.0}.get(path[-1].key, 0.0)
        return np.asarray(
            value + (0 if path[-1].key in ("min", "max") else 0.3) * rng.normal(size=leaf.shape),
            leaf.dtype,
        )

    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    return model, jax.tree_util.tree_map_with_path(drawn, dict(shapes)), inputs


def given_of(model, inputs, form):
    if inputs.dtype == np.float32:
        return stablehlo.examples_input(inputs.shape[1:])
    context = generate.context_of(model)
    return stablehlo.tokens_input(VOCABULARY, context, one_step=form == "step")


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """(what each program gave when a stranger called it, what its model gives, its description), by
    'model-form'.
    """
    folder = tmp_path_factory.mktemp("programs")
    asked, expected, about = {}, {}, {}
    for name, (values, forms) in MODELS.items():
        model, variables, inputs = make(values)
        for form in forms:
            case, weights = f"{name}-{form}", variables
            if form == "packed":
                weights = pack(model, variables, inputs)
            given = given_of(model, inputs, form)
            program = (
                stablehlo.to_step_program(model, weights)
                if form == "step"
                else stablehlo.to_program(model.apply, weights, given)
            )
            about[case] = stablehlo.save(program, folder / f"{case}.stablehlo", {}, given)
            np.save(folder / f"{case}.npy", inputs)
            asked[case] = [
                (b, t if given.dtype == "int32" else 0) for b, t in zip(BATCHES, (1, 5, CONTEXT))
            ]
            expected[case] = np.asarray(quick_jit(model.apply)(weights, inputs))
    (folder / "asked.json").write_text(json.dumps(asked))
    result = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER], cwd=folder, env=CPU, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return asked, dict(np.load(folder / "found.npz")), expected, about


@pytest.mark.parametrize("name, form", CASES)
def test_a_program_gives_what_its_model_gives(called, name, form):
    asked, found, expected, _ = called
    case = f"{name}-{form}"
    tolerance = 2e-2 if MODELS[name][0].get("dtype") == "bfloat16" else 1e-4
    whole = expected[case]
    assert np.std(whole) > 1e-2
    if form == "step":
        np.testing.assert_allclose(found[case], whole, atol=tolerance)
        return
    for i, (b, t) in enumerate(asked[case]):
        # Causal models give the first tokens the same logits whatever comes behind them.
        result, part = found[f"{case} {i}"], whole[:b, :t] if t else whole[:b]
        assert result.shape == part.shape and result.dtype == np.float32
        if case == "vit_integer-packed":
            np.testing.assert_array_equal(result, part)
        np.testing.assert_allclose(result, part, atol=tolerance)


def test_descriptions(called):
    about = called[3]
    tokens, images = about["gpt-packed"], about["vit_integer-packed"]
    assert tokens["platforms"] == ["cpu", "tpu", "cuda"]
    assert (
        tokens["inputs"][0]["shape"] == ["b", "t"]
        and f"t <= {CONTEXT}" in tokens["inputs"][0]["limits"]
    )
    assert tokens["outputs"] == [
        {"name": "logits", "shape": ["b", "t", VOCABULARY], "dtype": "float32"}
    ]
    assert not any("t <=" in limit for limit in about["matmulfree-trained"]["inputs"][0]["limits"])
    assert images["inputs"][0]["shape"] == ["b", 8, 8, 3] and images["outputs"][0]["shape"] == [
        "b",
        4,
    ]
    assert about["matmulfree-step"]["state"]["block_0"]["mixer"]["state"] == {
        "shape": ["b", 8],
        "dtype": "float32",
    }


def test_weights_are_inside_once_and_in_their_packed_form():
    """A file grows with the packed weights alone."""
    sizes = {}
    for num_luts in (64, 8192):
        values = LANGUAGE | {
            "name": "gpt",
            "heads": 2,
            "mlp": "weightless",
            "layers": 1,
            "weightless": WEIGHTLESS | {"num_luts": num_luts},
        }
        model, variables, inputs = make(values)
        weights = pack(model, variables, inputs)
        program = stablehlo.to_program(
            model.apply, weights, given_of(model, inputs, "packed"), ["cpu"]
        )
        sizes[num_luts] = (len(program.serialize()), stored_bytes(weights), stored_bytes(variables))
    grown = [large - small for small, large in zip(*sizes.values())]
    assert grown[0] == pytest.approx(grown[1], rel=0.02) and grown[1] < grown[2] / 4


def test_what_is_not_used_stays_out():
    given = stablehlo.examples_input((100,))
    weights = {
        name: np.random.default_rng(0).normal(size=(100, 100)).astype(np.float32)
        for name in ("used", "unused")
    }
    program = stablehlo.to_program(lambda v, x: x @ v["used"], weights, given)
    assert 40_000 < len(program.serialize()) < 50_000


@pytest.mark.parametrize(
    "platforms, expected", [(("cpu", "tpu"), "cpu"), (("tpu",), "tpu"), (("cuda",), "gpu")]
)
def test_what_is_chosen_by_platform_works_wherever_the_program_does(platforms, expected):
    seen = []

    def apply(variables, x):
        offered = {"native": choice.native(choice.anywhere), "xla": choice.anywhere}
        seen.append((choice.platform(), choice.choose("f", None, offered)))
        return x + variables["w"]

    given = stablehlo.examples_input((3,))
    stablehlo.to_program(apply, {"w": np.ones(3, np.float32)}, given, platforms)
    assert seen == [(expected, "xla")]


def test_attention_of_one_platform_stays_at_home():
    values = MODELS["gpt"][0]
    model = models.build(values | {"attention": "cudnn"}, VOCABULARY)
    assert stablehlo.portable(model).config.attention == "xla"
    assert (
        stablehlo.portable(models.build(MODELS["dwn"][0], 4)).config
        == models.build(MODELS["dwn"][0], 4).config
    )


def test_mistakes_are_told_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"found 'gpu'. JAX calls NVIDIA GPUs cuda"):
        stablehlo.check({}, ["cpu", "gpu"])
    with pytest.raises(InputError, match=r"found 'tqu'. Did you mean 'tpu'"):
        stablehlo.check({}, ["tqu"])
    with pytest.raises(InputError, match=r"the weights are 2,415,919,104 bytes.*--packed"):
        stablehlo.check({"kernel": jax.ShapeDtypeStruct((9, 2**26), np.float32)}, ["cpu"])
    (tmp_path / "a.json").write_text("")
    with pytest.raises(InputError, match=r"a.json exists; give another name, or --overwrite"):
        stablehlo.check_target(tmp_path / "a.stablehlo")
    stablehlo.check_target(tmp_path / "a.stablehlo", overwrite=True)
    with pytest.raises(InputError, match="no folder"):
        stablehlo.check_target(tmp_path / "nowhere" / "a.stablehlo")
    with pytest.raises(InputError, match=r"expected a file such as model.stablehlo"):
        stablehlo.check_target(tmp_path / "b.json")
    for name in ("x" * 300, "x" * 252, "x" * 250 + ".bin"):  # with what is added to it, too long
        with pytest.raises(InputError, match=r"^--out"):
            stablehlo.check_target(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "gpt"
    loop.fit(
        tiny_config({"steps": 3, "model.layers": 1, "eval_every": 3, "checkpoint_every": 3}),
        workdir,
        progress=False,
    )
    return workdir


def test_the_command(trained, tmp_path, capsys):
    out = tmp_path / "model.stablehlo"
    command = [f"--workdir={trained}", f"--out={out}", "--packed", "--platforms=cpu,tpu"]
    assert export.main(command) == 0
    said = capsys.readouterr().out
    about = json.loads(out.with_suffix(".json").read_text())
    assert f"{out.stat().st_size:,} bytes" in said and "\n".join(about["load"]) in said
    opened = rundir.open_run(trained, data=False)
    assert about["tokenizer"] == opened.setup.tokenizer.to_json()
    assert about["config"]["model"] == to_dict(opened.setup.config)["model"]
    assert (about["form"], about["training_step"], about["platforms"]) == (
        "packed",
        3,
        ["cpu", "tpu"],
    )
    # The lines it prints, as somebody would run them.
    lines = "\n".join([*about["load"], "np.save('logits.npy', logits)"])
    result = subprocess.run(
        [sys.executable, "-I", "-c", lines], cwd=tmp_path, env=CPU, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    expected = quick_jit(opened.setup.model.apply)(opened.variables, np.zeros((3, 16), np.int32))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-4)
    with pytest.raises(InputError, match="exists; give another name, or --overwrite"):
        export.main(command)
    with pytest.raises(InputError, match="platforms: expected some of cpu"):
        export.main([*command[:1], f"--out={tmp_path / 'other.stablehlo'}", "--platforms=npu"])


def test_a_run_without_checkpoints(trained, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((trained / name).read_text())
    with pytest.raises(InputError, match="no checkpoints in"):
        export.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'model.stablehlo'}"])
    assert not (tmp_path / "model.stablehlo").exists()


def test_a_classifier(tmp_path):
    from quweit_jax.models.registry import defaults
    from quweit_jax.training.defaults import base_config

    config = base_config()
    config.data.source, config.model = "digits", defaults("dwn")
    config.model.update(num_luts=(40,), lut_inputs=3, thermometer_bits=2)
    config.update(steps=2, batch_size=8, eval_every=2, eval_batches=1, checkpoint_every=2)
    config.mesh.data = 1
    loop.fit(config.lock(), tmp_path / "run", progress=False)
    out = tmp_path / "digits.stablehlo"
    with pytest.raises(InputError, match=r"--step_function: .* is a classifier"):
        export.main([f"--workdir={tmp_path / 'run'}", f"--out={out}", "--step_function"])
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={out}"]) == 0
    about = json.loads(out.with_suffix(".json").read_text())
    assert (
        about["labels"] == list("0123456789")
        and about["inputs"][0]["shape"] == ["b", 64]
        and about["outputs"][0]["shape"] == ["b", 10]
    )
