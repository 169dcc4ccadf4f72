"""What a command is given to work on: a run, or a model in a folder of its own."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quweit_jax.errors import InputError, nearest

if TYPE_CHECKING:  # JAX is imported when there is something to do
    import flax.linen as nn
    import numpy as np
    from jaxtyping import PyTree

    from quweit_jax.config import Config
    from quweit_jax.data.pipeline import Dataset
    from quweit_jax.data.prompting import Prompting
    from quweit_jax.data.tokenizers import Tokenizer
    from quweit_jax.pretrained.folders import Found
    from quweit_jax.training.setup import Setup

_WINDOW = 1024  # tokens of a text on which a published model is evaluated, unless told otherwise
_READ_AT_ONCE = 8192  # tokens
# What may be said of a model beside --model: which data, and how they are read.
_SAYABLE = ("data.", "mesh.", "eval_batch_size")


@dataclasses.dataclass(frozen=True)
class Opened:
    """init_inputs: what the model is packed with. step: of a run. setup: of a run, and of a model
    that is opened by `open_setup`. about: of a model, see `pretrained.folders.Found`.
    """

    model: nn.Module
    variables: dict[str, PyTree]
    tokenizer: Tokenizer | None
    init_inputs: np.ndarray
    step: int | None = None
    setup: Setup | None = None
    prompting: Prompting | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def packed(self, *, asked: bool = True) -> dict[str, PyTree]:
        """The variables as deployed, or as they are if that is not asked for."""
        from quweit_jax.deploy.pack import pack

        if not asked or "packed" in self.variables:
            return self.variables
        return pack(self.model, self.variables, self.init_inputs)

    def deployed(self, packed: bool | None) -> dict[str, PyTree]:
        """The variables that text is generated with. packed: as `add_packed` has it.

        Raises:
          InputError: there is no such form.
        """
        from quweit_jax.deploy.pack import pack, packed_or_trained

        if packed is not False and "packed" not in self.variables:
            form = pack if packed else packed_or_trained
            return form(self.model, self.variables, self.init_inputs)
        if packed is False and "packed" in self.variables:
            raise InputError("--no-packed: this folder has the packed form alone; leave that out.")
        return self.variables

    def about_inputs(self) -> dict[str, Any]:
        """What makes inputs and reads outputs, where the model comes from, and its config, in plain
        values: what describes an exported program.
        """
        from quweit_jax.config import to_dict
        from quweit_jax.deploy.stablehlo import about_data
        from quweit_jax.models import registry

        if self.setup is not None:
            setup = self.setup
            about = about_data(self.tokenizer, setup.data_config.normalize, setup.data)
            return about | {"training_step": self.step, "config": to_dict(setup.config)}
        kept = ("labels", "pixels", "kind", "training_step")
        about = {key: self.about[key] for key in kept if key in self.about}
        about |= {"config": {"model": registry.described(self.model)[0]}}
        if self.tokenizer is not None:
            about["tokenizer"] = self.tokenizer.to_json()
        if self.prompting is not None and self.prompting != type(self.prompting)():
            about["prompting"] = self.prompting.to_json()
        return about


def add_source(parser: argparse.ArgumentParser) -> None:
    """--workdir or --model, and --step of the former."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="a run directory")
    add_model(source)
    parser.add_argument(
        "--step",
        type=int,
        help="of a run, a checkpoint's step (default: that of lowest validation loss)",
    )


def add_model(parser: Any, **options: Any) -> None:
    """--model alone."""
    parser.add_argument(
        "--model",
        help="a model's folder: one that `pack` wrote, or a published checkpoint in Hugging Face's "
        "layout with its tokenizer.json; or the name of a model that comes with the package; or of "
        "one on Hugging Face's hub, ORGANIZATION/NAME, which is fetched",
        **options,
    )


def add_packed(parser: argparse.ArgumentParser) -> None:
    """--packed and --no-packed of what generates text."""
    parser.add_argument(
        "--packed",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="as deployed: 1-bit tables, ternary weights at 2 bits (default: where the model has "
        "such a form)",
    )


def text_of(args: argparse.Namespace, opened: Opened) -> Tokenizer:
    """The tokenizer of a model that generates text; InputError for another."""
    if opened.tokenizer is None:
        given = f"--model: {args.model}" if args.model else f"--workdir: {args.workdir}"
        raise InputError(f"{given} is a classifier, which generates no text.")
    return opened.tokenizer


def has_tokenizer(args: argparse.Namespace) -> bool:
    """Whether --workdir or --model names a language model, told without arrays and data.

    Raises:
      InputError: there is neither.
    """
    from quweit_jax.training import rundir, stores

    if args.model is not None:
        return _found(args).tokenizer is not None
    place = stores.fetched(args.workdir)
    rundir.read_config(place)  # which says so where there is no run
    return rundir.read_tokenizer(place) is not None


def open_source(args: argparse.Namespace, overrides: Mapping[str, str]) -> Opened:
    """What --workdir or --model names, without data.

    Raises:
      InputError: there is none, or options that belong to the other.
    """
    if args.model is None:
        return _run(args, overrides, data=False)
    if overrides:
        raise InputError("--model: expected no --config.KEY here, which are of runs.")
    return _opened(_found(args))


def open_setup(
    args: argparse.Namespace, overrides: Mapping[str, str], *, data: bool = True, context: int = 0
) -> tuple[Opened, Setup]:
    """The same with its setup: the data, and how they are read.

    Args:
      overrides: of a run any keys of its config, of a model those of the data. data: False leaves
        the data unread. context: of a language model, the tokens of a text that it is evaluated on;
        0: a model's own, at most 1,024, and a run's own.

    Raises:
      InputError: see `open_source`; or a model's data are not said, or do not fit it.
    """
    if args.model is None:
        if context:
            raise InputError("--context: of a run, give --config.model.context instead.")
        opened = _run(args, overrides, data=data)
        assert opened.setup is not None
        return opened, opened.setup
    found = _found(args)
    setup = _setup_of(found, overrides, data, context)
    return dataclasses.replace(_opened(found), setup=setup), setup


def config_of(found: Found, overrides: Mapping[str, str] | None = None) -> tuple[Config, int]:
    """A config that describes a model and, as far as they are known, its data; and its outputs.

    Raises:
      InputError: an override that is not of the data, or cannot be.
    """
    import ml_collections

    from quweit_jax.config import flat, set_value
    from quweit_jax.models import registry
    from quweit_jax.training.defaults import base_config

    values, outputs = registry.described(found.model)
    config = base_config()
    config.model = ml_collections.ConfigDict(values, type_safe=False)
    config.data.update(_data_of(found))
    known = [key for key in flat(config) if key.startswith(_SAYABLE)]
    if found.tokenizer is not None:  # its own is used
        known = [key for key in known if "tokenizer" not in key]
    for key, text in (overrides or {}).items():
        if key not in known:
            raise InputError(
                f"--config.{key}: a model is read as it is; only data, mesh and eval_batch_size "
                f"may be said of it.{nearest(key, known)}"
            )
        set_value(config, key, text)
    return config, outputs


def find_model(given: str, *, speaks: bool = True) -> Found:
    """What `pretrained.folders.find` finds of --model, which may be an address in a store."""
    from quweit_jax.pretrained import folders
    from quweit_jax.training import stores

    there = stores.is_address(given)
    return folders.find(str(stores.fetched(given, "--model")) if there else given, speaks=speaks)


def _found(args: argparse.Namespace) -> Found:
    if getattr(args, "step", None) is not None:
        raise InputError("--model: expected no --step, which is of runs.")
    return find_model(args.model)


def _opened(found: Found) -> Opened:
    return Opened(
        found.model,
        found.read(),
        found.tokenizer,
        found.init_inputs(),
        prompting=found.prompting,
        about=found.about,
    )


def _run(args: argparse.Namespace, overrides: Mapping[str, str], *, data: bool) -> Opened:
    from quweit_jax.training import rundir, stores

    run = rundir.open_run(stores.fetched(args.workdir), args.step, overrides, data=data)
    setup = run.setup
    return Opened(
        setup.model, run.variables, setup.tokenizer, setup.init_inputs, run.step, setup=setup
    )


def _setup_of(found: Found, overrides: Mapping[str, str], data: bool, context: int) -> Setup:
    from quweit_jax.deploy.generate import context_of
    from quweit_jax.training import rundir
    from quweit_jax.training.setup import assemble

    config, outputs = config_of(found, overrides)
    if found.tokenizer is not None:
        own = context_of(found.model)
        if context < 0 or (own is not None and context > own):
            raise InputError(
                f"--context: expected 1 to {own or 'any number of'} tokens, found {context}."
            )
        config.model.context = context or min(_WINDOW, config.model.context)
        if "eval_batch_size" not in overrides:
            most = max(1, _READ_AT_ONCE // config.model.context)
            config.eval_batch_size = min(config.eval_batch_size, most)
    elif context:
        raise InputError("--context: expected a language model, found a classifier; leave it out.")
    read = _read_data(found, config, overrides, outputs) if data else _no_data(found, outputs)
    mesh = rundir.mesh_here(config, overrides)
    made = assemble(config.lock(), data=read, training=False, mesh=mesh)
    return dataclasses.replace(made, model=found.model)


def _no_data(found: Found, outputs: int) -> Dataset:
    from quweit_jax.data.pipeline import Dataset

    labels, shape = tuple(found.about.get("labels", ())), found.about.get("input_shape", ())
    images = tuple(shape[1:]) if found.tokenizer is None and len(shape) == 4 else None
    return Dataset(
        [], [], outputs, "", tokenizer=found.tokenizer, labels=labels, image_shape=images
    )


def _read_data(found: Found, config: Config, overrides: Mapping[str, str], outputs: int) -> Dataset:
    """The data that a model is evaluated on, checked to be for such a model."""
    import numpy as np

    from quweit_jax.config import from_mapping
    from quweit_jax.data import pipeline
    from quweit_jax.data.registry import DataConfig

    said = {"data.source", "data.name", "data.path"} & overrides.keys()
    if not said and not found.about.get("data"):
        raise InputError(
            "--model: expected the data that it is to be evaluated on, found none; give "
            "--config.data.source=text_file --config.data.path=FILE, or another source."
        )
    if "pixels" in found.about and not config.data.normalize:
        raise InputError(
            "--model: its images are normalized by means and deviations that have no name here "
            f"({found.about['pixels']}); choose the nearest with --config.data.normalize."
        )
    context = None if found.tokenizer is None else config.model.context
    data_config = from_mapping(DataConfig, config.data.to_dict(), "data")
    data = pipeline.load(data_config, context, found.tokenizer)
    if found.tokenizer is None:
        if data.tokenizer is not None or data.outputs != outputs:
            what = "text" if data.tokenizer is not None else f"{data.outputs:,} classes"
            raise InputError(
                f"--model: expected data of {outputs:,} classes, found {what}; give other data, or "
                "fine-tune a run from it, with train --config.init_from."
            )
        return data
    if data.tokenizer is None:
        raise InputError("--model: expected text for a language model, found labelled examples.")
    largest = int(np.max(getattr(data.validation, "tokens", [0])))
    if largest >= outputs:
        raise InputError(
            f"--model: the tokenizer gives token {largest:,}, the model has {outputs:,}; do they "
            "belong together?"
        )
    return dataclasses.replace(data, outputs=outputs)


def _data_of(found: Found) -> dict[str, Any]:
    """What is known of how a model's data are read, as keys of `config.data`."""
    about = found.about
    if isinstance(own := about.get("data_config"), dict):
        return own
    given: dict[str, Any] = {}
    name = about.get("data")
    if name:
        own_source = name in ("digits", "python_stdlib")
        given = {"source": name} if own_source else {"source": "tfds", "name": name}
    if found.published and "pixels" in about:
        given |= {"image_size": about["input_shape"][1], "to_rgb": about["input_shape"][3] == 3}
        given |= {"crop_fraction": about.get("crop_fraction", 1.0)}
    if "pixels" in about:
        given["normalize"] = _normalization(about["pixels"])
    return given


def _normalization(pixels: Mapping[str, Any]) -> str:
    """The name of means and deviations, '' for others than those that have one."""
    from quweit_jax.data.images import NORMALIZATIONS

    def alike(ours: tuple[float, ...], theirs: list[float]) -> bool:
        longest = max(len(ours), len(theirs))
        wide = [[*v] * longest if len(v) == 1 else [*v] for v in (ours, theirs)]
        return len(wide[0]) == len(wide[1]) and all(abs(a - b) < 1e-3 for a, b in zip(*wide))

    mean, deviation = pixels["mean"], pixels["deviation"]
    return next(
        (k for k, (m, d) in NORMALIZATIONS.items() if alike(m, mean) and alike(d, deviation)), ""
    )
