"""`config` and `models.registry`: values by annotation, and configs that an older version saved."""

import ast
from collections.abc import Sequence

import pytest

from quweit_jax import models
from quweit_jax.config import flat, from_dict, load_file, load_module, parse_value, set_value
from quweit_jax.errors import InputError
from quweit_jax.models import registry
from quweit_jax.training import defaults, rundir
from tests.conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / "experiments" / "configs").glob("[!_]*.py"))


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
    found = parse_value(text, annotation, "key")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation"),
    [("1", bool), ("True", int), ("1.5", int), ("none", int), ("(1.5,)", tuple[int, ...])],
)
def test_values_of_another_type_are_refused(text, annotation):
    with pytest.raises(InputError, match=r"--config\.key: expected .*, found"):
        parse_value(text, annotation, "key", 1)


def test_annotations_decide_not_what_is_there(tiny_config):
    config = tiny_config({"optimizer.tables_learning_rate": "none"})
    set_value(config, "optimizer.tables_learning_rate", "1")
    set_value(config, "data.data_dir", "1")
    assert config.optimizer.tables_learning_rate == 1.0 and config.data.data_dir == "1"
    set_value(config, "data.data_dir", "none")
    assert config.data.data_dir is None


def test_a_key_that_a_saved_config_lacks_has_todays_default(tiny_config, tmp_path):
    config = tiny_config()
    saved = config.to_dict()
    for section, key in (("model", "gelu"), ("optimizer", "ema"), ("data", "threads")):
        del saved[section][key]
    del saved["grad_accum"], saved["model"]["weightless"]["window"]
    old = defaults.complete(from_dict(saved))
    assert flat(old) == flat(config)
    rundir.check_same(old, config, tmp_path)
    changed = tiny_config({"model.gelu": "tanh"})
    with pytest.raises(InputError, match=r"model\.gelu \(there 'exact', now 'tanh'\)"):
        rundir.check_same(old, changed, tmp_path)


@pytest.mark.parametrize("name", registry.MODELS)
def test_registry(name):
    values, model = registry.defaults(name).to_dict(), registry.find(name)
    assert model.outputs not in values
    assert isinstance(models.build(values, 5).config, model.config)
    assert getattr(registry.config_of(values, 5), model.outputs) == 5
    with pytest.raises(InputError, match=r"model\.name: expected one of .*Did you mean"):
        registry.find(name + "x")


def test_experiment_files_may_leave_out_their_folder(tmp_path):
    folder = tmp_path / "experiments" / "configs"
    folder.mkdir(parents=True)
    (folder / "one.py").write_text("def get_config(argument=None): return argument")
    module, argument = load_module(f"{tmp_path / 'experiments' / 'one.py'}:a,b=1")
    assert module.get_config(argument) == "a,b=1"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_file_stands_alone(file, tmp_path, monkeypatch):
    """It is found without its folder's name and from any folder, says what it has and runs nothing,
    and builds on no other model's file.
    """
    monkeypatch.chdir(tmp_path)
    short = load_file(str(REPOSITORY / "experiments" / file.name))
    assert short.to_dict() == load_file(str(file)).to_dict()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    public = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {name for name in public if name[0] != "_"} - {"sweep"} == {"get_config"}
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    others = {node.module for node in imported if node.module.startswith("experiments")}
    names = {alias.name for node in imported for alias in node.names}
    assert others <= {"experiments.configs"} and not names & {other.stem for other in CONFIGS}


def test_a_shortcut_sets_its_key():
    """Each is a key of at least one model, and of each model at most one."""
    left = set(defaults.SHORTCUTS)
    for name in registry.MODELS:
        config = defaults.base_config()
        config.model = registry.defaults(name)
        known = flat(config)
        keys = {key: short for key, short in defaults.SHORTCUTS.items() if key in known}
        assert len(set(keys.values())) == len(keys)
        for key, short in keys.items():
            value = "(7,)" if isinstance(known[key], tuple) else str(7 if known[key] != 7 else 8)
            if isinstance(known[key], bool):
                value = str(not known[key])
            changed = defaults.with_shortcuts(config.copy_and_resolve_references(), {short: value})
            assert {k for k, v in flat(changed).items() if v != known[k]} == {key}
        left -= set(keys)
    assert not left
    with pytest.raises(InputError, match=r"unknown key 'widht'.*Did you mean 'width'\?"):
        defaults.with_shortcuts(config, {"widht": "3"})
