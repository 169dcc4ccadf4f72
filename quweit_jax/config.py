"""Configs as code: an experiment file's `get_config(argument)`, shortcuts after the colon, and
`--config.path=value` overrides.

Everything is an `ml_collections.ConfigDict`; an unknown key is an error that names the nearest key.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ml_collections

from quweit_jax.errors import InputError, nearest

# An ml_collections.ConfigDict: what its attributes hold has no static type.
Config: TypeAlias = Any


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{'optimizer.clip': 1.0, ...}."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping | ml_collections.ConfigDict)
            else {prefix + key: value}
        )
    return out


def parse_argument(
    argument: str | None, variants: Sequence[str], default: str
) -> tuple[str, dict[str, str]]:
    """Splits what follows the colon, 'variant,key=value,...', into the variant (or the default) and
    the shortcuts.
    """
    parts = [p.strip() for p in (argument or "").split(",") if p.strip()]
    variant = default
    if parts and "=" not in parts[0]:
        variant = parts.pop(0)
        if variant not in variants:
            raise InputError(
                f"config variant: expected one of {list(variants)}, found "
                f"'{variant}'.{nearest(variant, variants)}"
            )
    shortcuts = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(
                f"config argument: expected key=value after the variant, found '{part}'. Example: "
                f":{variant},mlp=weightless"
            )
        shortcuts[key.strip()] = value.strip()
    return variant, shortcuts


def apply_shortcuts(
    config: Config, shortcuts: Mapping[str, str], aliases: Mapping[str, str]
) -> Config:
    """Sets each shortcut, an alias ('mlp') or a full path ('model.mlp'), and locks the config."""
    known = set(flat(config))
    for key, value in shortcuts.items():
        path = aliases.get(key, key)
        if path not in known:
            raise InputError(
                f"config argument: unknown key '{key}'.{nearest(key, known | set(aliases))}"
            )
        set_value(config, path, value)
    return config.lock()


def set_value(config: Config, path: str, text: str) -> None:
    """Sets a dotted path from text, read as the type of what is there.

    Raises:
      InputError: an unknown key (names the nearest), or a value of another type.
    """
    known = flat(config)
    if path not in known:
        raise InputError(f"--config.{path}: unknown key '{path}'.{nearest(path, known)}")
    *parents, last = path.split(".")
    node: Any = config
    for parent in parents:
        node = node[parent]
    with config.unlocked():
        node[last] = parse_value(text, known[path], path)


def parse_value(text: str, current: Any, path: str) -> Any:
    """Text as a value of the type of `current`, what the config holds now; numbers that may be left
    out also read 'none'.
    """
    optional = path.endswith(("_learning_rate", ".alpha", ".beta"))
    if path.endswith("data_dir"):
        return None if text.lower() == "none" else text
    if isinstance(current, str) or (current is None and not optional):
        return text
    try:
        value = ast.literal_eval(
            {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
        )
    except (ValueError, SyntaxError):
        raise InputError(
            f"--config.{path}: expected {_expected(current, optional)}, found '{text}'."
        ) from None
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if (
        isinstance(current, int)
        and not isinstance(current, bool)
        and isinstance(value, float)
        and value.is_integer()
    ):
        value = int(value)
    allowed: tuple[type, ...] = (type(current),)
    if isinstance(current, tuple | list) or path.endswith("num_luts"):
        allowed = (tuple, list, int)
        if isinstance(value, tuple | list) and not all(type(v) is int for v in value):
            raise InputError(
                f"--config.{path}: expected a whole number or several such as (64, 32), found "
                f"'{text}'."
            )
    if optional:
        allowed = (float, int, type(None))
    if not isinstance(value, allowed) or isinstance(value, bool) != isinstance(current, bool):
        raise InputError(
            f"--config.{path}: expected {_expected(current, optional)}, found '{text}'."
        )
    return tuple(value) if isinstance(value, list) else value


def _expected(current: Any, optional: bool) -> str:
    if optional:
        return "a number or none"
    kind = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        tuple: "whole numbers",
    }.get(type(current), type(current).__name__)
    return f"{kind} such as {current!r}"


def load_module(spec: str) -> tuple[Any, str]:
    """'experiments/gpt_char.py:nanogpt_cpu,mlp=weightless' -> (the experiment file as a module,
    what is behind the colon).
    """
    path, _, argument = spec.partition(":")
    file = Path(path)
    if not file.is_file():
        near = (
            sorted(str(p) for p in Path("experiments").glob("*.py"))
            if Path("experiments").is_dir()
            else []
        )
        raise InputError(
            f"--config: no file at {path}."
            + (
                nearest(path, near)
                if near
                else " Run it where experiments/ is, or give a full path."
            )
        )
    module_spec = importlib.util.spec_from_file_location(f"quweit_experiment_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # Experiment files may build on one another, `from experiments import x`, wherever the command
    # was started.
    beside = str(file.resolve().parent.parent)
    if beside not in sys.path:
        sys.path.append(beside)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"--config: {path} has no get_config(argument).")
    return module, argument


def load_file(spec: str) -> Config:
    """'experiments/gpt_char.py:nanogpt_cpu,mlp=weightless' -> its config, locked."""
    module, argument = load_module(spec)
    return module.get_config(argument or None).lock()


def from_dict(values: Mapping[str, Any]) -> Config:
    """A locked config from what `to_dict` or a run's config.json holds."""
    return ml_collections.ConfigDict(dict(values), type_safe=False).lock()


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values."""
    return json.loads(json.dumps(config.to_dict()))
