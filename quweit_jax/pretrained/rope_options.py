"""Rotary positions in a config.json of Hugging Face's programs: read, checked, and written."""

from __future__ import annotations

from typing import Any

from quweit_jax.errors import InputError
from quweit_jax.layers.rotary import SCALINGS, RopeScaling
from quweit_jax.pretrained.published_config import PublishedConfig

# Of each kind: our field, the published name, and its default (None: it must be there).
_FIELDS: dict[str, tuple[tuple[str, str, float | None], ...]] = {
    "default": (),
    "linear": (("factor", "factor", None),),
    "dynamic": (("factor", "factor", None),),
    "llama3": (
        ("factor", "factor", None),
        ("low_frequency", "low_freq_factor", None),
        ("high_frequency", "high_freq_factor", None),
    ),
    "yarn": (
        ("factor", "factor", None),
        ("beta_fast", "beta_fast", 32.0),
        ("beta_slow", "beta_slow", 1.0),
        ("attention_factor", "attention_factor", 0.0),
    ),
}
# Of both ways to write them: names of any kind, and of yarn alone.
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_OF_YARN = {"truncate", "mscale", "mscale_all_dim"}


def read(config: PublishedConfig, theta: float) -> tuple[float, RopeScaling, int]:
    """(base, scaling, context) of the rotary positions.

    theta: the base where the file says none. Programs before transformers 5 write rope_theta and
    rope_scaling, later ones rope_parameters, in which a base is preferred. 'dynamic' positions have
    no most tokens in the published program: the context is the original one times the factor.

    Raises:
      InputError: an unknown kind, a missing or impossible number, or positions of a part of a head;
        names the key.
    """
    theta = config.get("rope_theta", theta)
    config.only("partial_rotary_factor", 1)
    context, scaling = config.whole("max_position_embeddings", 2048), RopeScaling()
    outside = config.get("original_max_position_embeddings")
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key, {})
        if not isinstance(rope, dict):
            raise config.error(key, "an object of names and values", rope)
        if rope.get("partial_rotary_factor") not in (None, 1):
            raise config.error(
                key, "rotary positions of whole heads", rope, "the model here cannot do otherwise."
            )
        theta = theta if rope.get("rope_theta") is None else rope["rope_theta"]
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in SCALINGS:
            raise config.error(
                key,
                f"rotary positions of type {', '.join(SCALINGS)}",
                rope,
                "others are not supported.",
            )
        if kind != "default":
            scaling = _scaling(config, key, kind, rope, context, outside)
    if scaling.kind == "dynamic":
        context = int(context * scaling.factor)
    return config.check_positive("rope_theta", theta), scaling, context


def _scaling(
    config: PublishedConfig, key: str, kind: str, rope: dict[str, Any], context: int, outside: Any
) -> RopeScaling:
    known = {name for _, name, _ in _FIELDS[kind]} | _COMMON | {"original_max_position_embeddings"}
    known |= _OF_YARN if kind == "yarn" else set()
    if unknown := sorted(name for name in rope if name not in known and rope[name] is not None):
        raise config.error(
            key, f"the options of '{kind}'", rope, f"{', '.join(unknown)} is none of them."
        )
    values: dict[str, Any] = {"kind": kind}
    for ours, name, default in _FIELDS[kind]:
        found = rope.get(name)
        if found is not None:
            values[ours] = config.check_positive(f"{key}.{name}", found)
        elif default is None:
            raise config.error(f"{key}.{name}", "a number", None)
        else:
            values[ours] = default
    if kind in ("dynamic", "llama3", "yarn"):
        original = outside or rope.get("original_max_position_embeddings") or context
        original = context if kind == "dynamic" else original
        if type(original) is not int or original < 1:
            where = f"{key}.original_max_position_embeddings"
            raise config.error(where, "a number of tokens", original)
        values["original_context"] = original
    if kind == "yarn":
        truncate = rope.get("truncate", True)
        if not isinstance(truncate, bool):
            raise config.error(f"{key}.truncate", "true or false", truncate)
        values["truncate"] = truncate
        scales = [rope.get("mscale"), rope.get("mscale_all_dim")]
        if not values["attention_factor"] and all(scales):
            own = RopeScaling("yarn", values["factor"]).magnitude() - 1
            top, bottom = (1 + own * config.check_positive(key, scale) for scale in scales)
            values["attention_factor"] = top / bottom
    try:
        return RopeScaling(**values)
    except InputError as error:
        raise config.error(key, f"rotary positions that can be ({error})", rope) from None


def write(theta: float, scaling: RopeScaling, context: int) -> dict[str, object]:
    """The keys of config.json: rope_theta and rope_scaling for programs before transformers 5,
    rope_parameters for later ones, and max_position_embeddings.
    """
    original = scaling.original_context or context
    rope: dict[str, object] = {"rope_type": scaling.kind}
    for ours, name, _ in _FIELDS[scaling.kind]:
        rope |= {name: getattr(scaling, ours)}
    if scaling.kind in ("llama3", "yarn"):
        rope |= {"original_max_position_embeddings": original}
    if scaling.kind == "yarn":
        rope |= {"truncate": scaling.truncate, "attention_factor": scaling.magnitude()}
    found: dict[str, object] = {
        "max_position_embeddings": original if scaling.kind == "dynamic" else context,
        "rope_theta": theta,
        "rope_parameters": rope | {"rope_theta": theta},
    }
    return found | ({} if scaling.kind == "default" else {"rope_scaling": rope})
