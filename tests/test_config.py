"""`config` and `models.registry`: values by annotation, and configs that an older version saved."""

from collections.abc import Sequence

import pytest

from quweit_jax import config as configs
from quweit_jax import models
from quweit_jax.errors import InputError
from quweit_jax.models import registry
from quweit_jax.training import defaults, rundir


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("3", int, 3),
        ("3.0", int, 3),
        ("1e3", int, 1000),
        ("2", float, 2.0),
        ("true", bool, True),
        ("none", float | None, None),
        ("1", float | None, 1.0),
        ("none", str | None, None),
        ("none", str, "none"),
        ("64", int | Sequence[int], 64),
        ("(64, 32)", int | Sequence[int], (64, 32)),
        ("[64, 32]", tuple[int, ...], (64, 32)),
        ("64", tuple[int, ...], (64,)),
    ],
)
def test_values_are_read_by_annotation(text, annotation, value):
    found = configs.parse_value(text, annotation, "key")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation"),
    [("1", bool), ("True", int), ("1.5", int), ("none", int), ("(1.5,)", tuple[int, ...])],
)
def test_values_of_another_type_are_refused(text, annotation):
    with pytest.raises(InputError, match=r"--config\.key: expected .*, found"):
        configs.parse_value(text, annotation, "key", 1)


def test_annotations_decide_not_what_is_there(tiny_config):
    config = tiny_config({"optimizer.tables_learning_rate": "none"})
    configs.set_value(config, "optimizer.tables_learning_rate", "1")
    configs.set_value(config, "data.data_dir", "1")
    assert config.optimizer.tables_learning_rate == 1.0 and config.data.data_dir == "1"
    configs.set_value(config, "data.data_dir", "none")
    assert config.data.data_dir is None


def test_a_key_that_a_saved_config_lacks_has_todays_default(tiny_config, tmp_path):
    config = tiny_config()
    saved = config.to_dict()
    for section, key in (("model", "gelu"), ("optimizer", "ema"), ("data", "threads")):
        del saved[section][key]
    del saved["grad_accum"], saved["model"]["weightless"]["window"]
    old = defaults.complete(configs.from_dict(saved))
    assert configs.flat(old) == configs.flat(config)
    rundir.check_same(old, config, tmp_path)
    changed = tiny_config({"model.gelu": "tanh"})
    with pytest.raises(InputError, match=r"model\.gelu \(there 'exact', now 'tanh'\)"):
        rundir.check_same(old, changed, tmp_path)


@pytest.mark.parametrize("name", registry.MODELS)
def test_registry(name):
    values, model = registry.defaults(name).to_dict(), registry.find(name)
    assert model.outputs not in values
    assert isinstance(models.build(values, 3).config, model.config)
    assert getattr(registry.config_of(values, 3), model.outputs) == 3
    with pytest.raises(InputError, match=r"model\.name: expected one of .*Did you mean"):
        registry.find(name + "x")


def test_experiment_files_may_leave_out_their_folder(tmp_path):
    folder = tmp_path / "experiments" / "configs"
    folder.mkdir(parents=True)
    (folder / "one.py").write_text("def get_config(argument=None): return argument")
    module, argument = configs.load_module(f"{tmp_path / 'experiments' / 'one.py'}:a,b=1")
    assert module.get_config(argument) == "a,b=1"
