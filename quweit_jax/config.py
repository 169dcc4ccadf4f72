"""Configs as code: an experiment file's `get_config(argument)`, shortcuts after the colon, and
`--config.path=value` overrides.

Everything is an `ml_collections.ConfigDict`; an unknown key is an error that names the nearest key.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import ml_collections

from quweit_jax.errors import InputError, first_line, nearest
from quweit_jax.reading import kind_of, shown

# An ml_collections.ConfigDict: what its attributes hold has no static type.
Config: TypeAlias = Any
T = TypeVar("T")

# Which dataclass the keys of a section ('model', 'data', ...) are for, told by the modules that
# define them: section -> a function of the section's values.
SECTIONS: dict[str, Callable[[Mapping[str, Any]], type]] = {}
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    NoneType: "none",
}
_WHOLE = range(-(2**63), 2**63)


def flat(config: Config, prefix: str = "") -> dict[str, Any]:
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
    """Sets a dotted path from text, read by the annotation of the path's dataclass (SECTIONS).

    Raises:
      InputError: an unknown key (names the nearest), or a value of another type.
    """
    known = flat(config)
    if path not in known:
        raise InputError(f"--config.{path}: unknown key '{path}'.{nearest(path, known)}")
    *parents, last = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    with config.unlocked():
        node[last] = parse_value(text, _annotation(config, path, known[path]), path, known[path])


def _annotation(config: Config, path: str, current: object) -> Any:
    """What a path may hold: its field's annotation or, without a dataclass, the type it has now."""
    section, *keys = path.split(".")
    kind = SECTIONS[section](config[section]) if keys and section in SECTIONS else None
    for key in keys:
        kind = get_type_hints(kind).get(key) if dataclasses.is_dataclass(kind) else None
    return kind or (str if current is None else type(current))


def parse_value(text: str, annotation: Any, path: str, example: object = None) -> Any:
    """Text as a value of an annotation such as `float | None`; `example` is for the message.

    Raises:
      InputError: it is none.
    """
    kinds = _kinds(annotation)
    if NoneType in kinds and text.lower() == "none":
        return None
    if str in kinds:
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    several = any(issubclass(get_origin(kind) or kind, Sequence) for kind in kinds)
    if type(value) in kinds and not several:
        return value
    if type(value) is int and float in kinds:
        return float(value)
    if type(value) is float and value.is_integer() and int in kinds:
        return int(value)
    if several and type(value) is int:
        return value if int in kinds else (value,)
    if several and isinstance(value, tuple | list) and all(type(v) is int for v in value):
        return tuple(value)
    found = _KINDS.get(next(k for k in kinds if k is not NoneType), str(annotation))
    if several:
        found = "a whole number or several such as (64, 32)"
    else:
        found += " or none" if NoneType in kinds else f" such as {example!r}"
    raise InputError(f"--config.{path}: expected {found}, found '{text}'.")


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation such as `int | None` allows."""
    union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if union else (annotation,)


def checked(value: Any, annotation: Any, path: str) -> Any:
    """A value of Python or JSON, if it is one of an annotation such as `float | None`; a whole
    number may be written as 3.0, a sequence as a list, and one of whole numbers that has a single
    one as that. Other annotations allow anything.

    Raises:
      InputError: it is none; names `path`.
    """
    kinds = _kinds(annotation)
    plain = [kind for kind in kinds if kind in _KINDS]
    several = [kind for kind in kinds if issubclass(_class_of(kind), Sequence) and kind is not str]
    if len(plain) + len(several) < len(kinds):
        return value
    if isinstance(value, list | tuple) and several:
        inside = get_args(several[0])[:1]
        return tuple(checked(v, inside[0], path) if inside else v for v in value)
    if type(value) is float and int in kinds and float not in kinds and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and {int, float} & {*kinds}:
        if value in _WHOLE:
            return value
    elif any(isinstance(value, kind) for kind in plain if kind is not int):
        return value
    if several and not plain and get_args(several[0])[:1] == (int,) and type(value) is int:
        return (checked(value, int, path),)
    wanted = [_KINDS[kind] for kind in plain] + ["a sequence"] * bool(several)
    raise InputError(f"{path}: expected {' or '.join(wanted)}, found {kind_of(value)}.")


def _class_of(kind: Any) -> type:
    found = get_origin(kind) or kind
    return found if isinstance(found, type) else object


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "model") -> T:
    """Builds a (frozen) dataclass from a mapping; nested dataclasses from nested mappings.

    Raises:
      InputError: an unknown key (names the nearest), a missing one, or a value of another type.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"{where}: unknown key '{key}'.{nearest(key, fields)}")
        value = value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
        factory = fields[key].default_factory
        if isinstance(value, Mapping) and factory is not dataclasses.MISSING:
            value = from_mapping(factory, value, f"{where}.{key}")  # type: ignore[arg-type]
        elif dataclasses.is_dataclass(hints[key]) and not isinstance(value, hints[key]):
            raise InputError(f"{where}.{key}: expected an object, found {kind_of(value)}.")
        value = checked(value, hints[key], f"{where}.{key}")
        arguments[key] = tuple(value) if isinstance(value, list) else value
    needed = (
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    if missing := [name for name in needed if name not in arguments]:
        raise InputError(f"{where}: missing {', '.join(missing)}.")
    return cls(**arguments)


def with_defaults(saved: Config, defaults: Config) -> Config:
    """A saved config, locked, that has of `defaults` every key which it lacks."""

    def fill(values: Mapping[str, Any], missing: Mapping[str, Any]) -> dict[str, Any]:
        filled = {**missing, **values}
        for key, value in missing.items():
            if isinstance(value, Mapping) and isinstance(filled[key], Mapping):
                filled[key] = fill(filled[key], value)
        return filled

    return from_dict(fill(saved.to_dict(), defaults.to_dict()))


def load_module(spec: str) -> tuple[ModuleType, str]:
    """(The experiment file of 'FILE.py:ARGUMENT' as a module, the argument).

    FILE may leave out the folder configs: experiments/x.py is experiments/configs/x.py if only that
    is there.
    """
    path, _, argument = spec.partition(":")
    file = Path(path)
    if not os.path.isfile(file):
        file = file.parent / "configs" / file.name
    if not os.path.isfile(file):
        folders = Path("experiments/configs"), Path("experiments")
        near = [p.as_posix() for folder in folders for p in folder.glob("[!_]*.py")]
        help = " Run it where experiments/ is, or give a full path."
        raise InputError(f"--config: no file at {path}.{nearest(path, near) if near else help}")
    module_spec = importlib.util.spec_from_file_location(f"quweit_experiment_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise InputError(
            f"--config: expected an experiment file that ends in .py, found {shown(path)}; give "
            "one such as experiments/configs/gpt_char.py:quick, or go on with a run by --workdir "
            "alone."
        )
    module = importlib.util.module_from_spec(module_spec)
    # Experiment files may share what they say, `from experiments.configs import x`, wherever the
    # command was started.
    folder = file.resolve().parent
    beside = str(folder.parents[folder.name == "configs"])
    if beside not in sys.path:
        sys.path.append(beside)
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise InputError(
            f"--config: {shown(path)} is no Python that can be read ({first_line(error)}); mend it."
        ) from None
    if not callable(getattr(module, "get_config", None)):
        raise InputError(f"--config: {path} has no get_config(argument).")
    return module, argument


def load_file(spec: str) -> Config:
    """'experiments/configs/gpt_char.py:nanogpt_cpu,mlp=weightless' -> its config, locked."""
    module, argument = load_module(spec)
    config = module.get_config(argument or None)
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"--config: get_config of {spec.partition(':')[0]}: expected a ConfigDict, found "
            f"{type(config).__name__}; return defaults.with_shortcuts(config, shortcuts), as the "
            "experiments do."
        )
    return config.lock()


def from_dict(values: Mapping[str, Any]) -> Config:
    """A locked config from what `to_dict` or a run's config.json holds.

    Raises:
      InputError: it has names that no config can have.
    """
    try:
        return ml_collections.ConfigDict(dict(values), type_safe=False).lock()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"expected names and values of a config ({first_line(error)}).") from None


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values."""
    return json.loads(json.dumps(config.to_dict()))
