"""The options of a published checkpoint: each is read, known to change no result, or refused by
name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from quweit_jax.errors import InputError
from quweit_jax.pretrained.tensors import read_config

# Names by which programs know what they run, how they train, and how they generate: nothing that
# decides the logits of trained weights.
_HARMLESS = re.compile(
    r"_.*|architectures?|auto_map|model_type|name|license|torch_dtype|dtype|transformers_version"
    r"|(\w+_)?token_ids?|id2label|label2id|num_labels|problem_type|task_specific_params"
    r"|tokenizer_.*|finetuning_task|summary_.*|output_(attentions|hidden_states|scores|past)"
    r"|return_.*|use_cache|.*initializer_range|initializer_.*|.*drop(out|_rate|_path_rate)?|.*_pdrop"
    r"|gradient_checkpointing|use_bfloat16|fuse_.*|use_fused.*"
    r"|temperature|top_[kp]|typical_p|do_sample|num_beams|num_beam_groups|max_length|min_length"
    r"|.*_penalty|early_stopping|num_return_sequences|bad_words_ids|.*no_repeat_ngram_size|prefix"
    r"|(begin_)?suppress_tokens|remove_invalid_values|keys_to_ignore.*|torchscript|tf_legacy_loss"
    r"|chunk_size_feed_forward"
)
# Options of programs related to those read here, whose checkpoints lie in the same layout but mean
# another arithmetic.
_ARITHMETIC = (
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier", "output_multiplier"),
    *("logit_scale", "logits_scaling", "output_scale", "attn_logit_softcapping", "clip_qkv"),
    *("final_logit_softcapping", "query_pre_attn_scalar", "sliding_window", "no_rope_layers"),
)


class PublishedConfig:
    """Options by name, checked; what is missing or null has the program's default.

    Which ones were asked for is remembered: `finish` names the others.
    """

    def __init__(self, where: Path | str, values: Mapping[str, Any]):
        self.where, self._values = where, dict(values)
        self._asked: set[str] = set()

    @classmethod
    def of_type(
        cls,
        folder: Path,
        model_types: str | Sequence[str],
        required: Iterable[str],
        *,
        quantized: bool = False,
    ) -> PublishedConfig:
        """The config.json of a folder, of one of some model_types of Hugging Face's programs.

        quantized: whether the caller knows what to do with a `quantization_config`.

        Raises:
          InputError: there is no such file, it is of another model_type, a required key is
            missing, or the weights are quantized or pruned.
        """
        config = cls(folder / "config.json", read_config(folder, ()))
        known = [model_types] if isinstance(model_types, str) else model_types
        found = config.get("model_type")
        if found not in known:
            raise InputError(
                f"pretrained: expected model_type {' or '.join(map(repr, known))} in "
                f"{config.where}, found {found!r}; load it with the kind of its own."
            )
        config.require(*required)
        config.only_float_weights(quantized)
        return config

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def require(self, *keys: str) -> None:
        """Raises InputError unless all of these are there."""
        missing = [key for key in keys if key not in self._values]
        if missing:
            raise InputError(
                f"pretrained: {self.where} lacks {', '.join(missing)}; "
                "is it the config of this kind of model?"
            )

    def only_float_weights(self, quantized: bool = False) -> None:
        """Raises InputError for what Hugging Face's programs can do to any model, and for options
        of other models that change the arithmetic. quantized: as of `of_type`.
        """
        for key in ("use_sliding_window", "use_qk_norm", "qk_norm"):
            self.only(key, False)
        unused = {"sliding_window"} if "use_sliding_window" in self else set()  # it is False
        for key in _ARITHMETIC:
            if key not in unused:
                self.only(key, None)
        if not quantized:
            self.only("quantization_config", None)
        self.only("pruned_heads", None, {})
        self.only("is_encoder_decoder", False)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        self._asked.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """A whole number from 1 to `most`."""
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.error(key, f"a whole number from 1 to {most}", value)
        return value

    def positive(self, key: str, default: float) -> float:
        """A positive number."""
        return self.check_positive(key, self.get(key, default))

    def check_positive(self, key: str, value: Any) -> float:
        """The value, if it is a positive number."""
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(key, "a positive number", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def only(self, key: str, *supported: Any) -> Any:
        """The value; raises InputError unless it is one of these, of which the first is the
        default.
        """
        value = self.get(key, supported[0])
        if not any(
            value == known and isinstance(value, bool) == isinstance(known, bool)
            for known in supported
        ):
            raise self.error(
                key,
                " or ".join(json.dumps(known) for known in supported),
                value,
                "the model here cannot do otherwise.",
            )
        return value

    def finish(self, *harmless: str) -> None:
        """Warns of options that were neither asked for nor are known to change no result.

        harmless: names of more of the latter.
        """
        left = sorted(
            key
            for key, value in self._values.items()
            if key not in self._asked and key not in harmless and value is not None
            if not _HARMLESS.fullmatch(key)
        )
        if left:
            logging.warning(
                "%s",
                f"{self.where}: options not known here are left out: {', '.join(left)}; if one of "
                "them changes what the model computes, its results differ from the published ones.",
            )

    def error(
        self, key: str, expected: str, found: Any, advice: str = "download it again."
    ) -> InputError:
        """An error that names file and key."""
        said = json.dumps(found, default=repr)
        return InputError(
            f"pretrained: {self.where}: {key}: expected {expected}, found {said}; {advice}"
        )
