"""Checkpoints on Hugging Face's hub, by name: fetched once, then read from its cache folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from quweit_jax.errors import InputError, first_line, require
from quweit_jax.reading import shown

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# Of a checkpoint's own folder: what describes it and its tokenizer, and its weights.
_DESCRIBING = (".json", ".jinja")
# Forms of the weights, the first that is there: some have others of the same weights beside.
_FORMS = (
    re.compile(r"model(-\d+-of-\d+)?\.safetensors"),
    re.compile(r"[^/]*\.safetensors"),
    re.compile(r"pytorch_model[^/]*\.bin"),
)
# What the cache must hold of a checkpoint to be whole without a network.
_KEPT = {"allow_patterns": ["*.json", "*.jinja"], "ignore_patterns": ["*/*"]}


def is_name(given: str) -> bool:
    """Whether this could be a name on a hub: ORGANIZATION/NAME, with @REVISION or without."""
    return _NAME.fullmatch(given) is not None


def fetch(given: str, cache: Path | None = None) -> Path:
    """The folder of a checkpoint on a hub, fetched unless it is there: its config, tokenizer and
    weights, as safetensors where it has such.

    Without a network what was fetched before is used. HF_ENDPOINT, HF_HOME and HF_TOKEN are those
    of Hugging Face's own programs.

    Args:
      given: 'ORGANIZATION/NAME', behind an '@' a branch, a tag or a commit. cache: another folder
        than Hugging Face's.

    Raises:
      InputError: it is not there, or cannot be fetched, or the package huggingface_hub is missing;
        says how to fetch it otherwise.
    """
    name, _, revision = given.partition("@")
    by_hand = (
        f"fetch it where there is a network, with `hf download {shown(name)} --local-dir FOLDER`, "
        "and give that folder"
    )
    hub = require("huggingface_hub", f"to fetch {shown(given)}", f"or {by_hand}")
    from huggingface_hub import errors

    where = {"repo_id": name, "revision": revision or None}
    options = {"cache_dir": cache, "endpoint": os.environ.get("HF_ENDPOINT") or None}
    try:
        api = hub.HfApi(endpoint=options["endpoint"])
        files = _wanted([s.rfilename for s in api.model_info(**where).siblings or ()])
        return Path(hub.snapshot_download(**where, **options, allow_patterns=files))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise InputError(
            f"--model: no folder {shown(given)}, and none that may be read on the hub "
            f"({type(error).__name__}); of a private or gated one, log in with `hf auth login`."
        ) from None
    except errors.HFValidationError as error:
        raise InputError(f"--model: {shown(given)}: {first_line(error)}") from None
    except InputError:
        raise
    except Exception as error:  # whatever a network can do
        reason = first_line(error)
    try:
        return Path(hub.snapshot_download(**where, **options, **_KEPT, local_files_only=True))
    except Exception:
        raise InputError(
            f"--model: no folder {shown(given)}, and the hub cannot be reached ({reason}); "
            f"{by_hand}."
        ) from None


def _wanted(files: Sequence[str]) -> list[str]:
    """Of all files of a checkpoint those that are read here."""
    found = ([name for name in files if form.fullmatch(name)] for form in _FORMS)
    weights = next(filter(None, found), None)
    if weights is None:
        raise InputError(
            "--model: expected weights, *.safetensors or pytorch_model*.bin, found "
            f"{', '.join(sorted(files)[:5]) or 'nothing'}; take another form of that model."
        )
    beside = [name for name in files if name.endswith(_DESCRIBING) and "/" not in name]
    return [*beside, *weights]
