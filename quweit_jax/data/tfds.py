"""Sets of TensorFlow Datasets, read with `tfds.data_source`: texts, documents and images."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np
from absl import logging

from quweit_jax.data.documents import DocumentSplits
from quweit_jax.data.image_sources import image_splits
from quweit_jax.data.registry import DataConfig, Splits, TextSplits, source
from quweit_jax.errors import InputError, first_line, require
from quweit_jax.reading import clean_text, why

_PORTS = {"http": 80, "https": 443}
_HOSTS, _PATIENCE = 3, 5  # how many hosts of downloads are tried, and for how many seconds


class TFDSImages:
    """Images and labels of a TFDS random-access source as they are stored: encoded bytes where
    `image` is one, arrays otherwise.
    """

    def __init__(self, builder: Any, name: str, split: str):
        import tensorflow_datasets as tfds

        image, label = builder.info.features["image"], builder.info.features["label"]
        if not getattr(label, "num_classes", None):
            raise InputError(
                f"data.name: expected classes as the label of {name}, found {label}; use another "
                "set."
            )
        shape = tuple(image.shape)
        self.channels = (
            shape[2] if len(shape) == 3 and shape[2] in (1, 3, 4) else 1 if len(shape) == 2 else 3
        )
        self.num_classes, self.labels = label.num_classes, tuple(label.names)
        self.place = f"{name}, split {split}"
        self._identity = f"{builder.info.full_name}, split {split}"
        # Encoded images are decoded here, which says what is wrong with a bad one, and needs
        # neither TensorFlow nor OpenCV.
        encoded = isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8
        self.records = builder.as_data_source(
            split=split, decoders={"image": tfds.decode.SkipDecoding()} if encoded else None
        )

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """See ImageSource."""
        record = self.records[index]
        return record["image"], int(record["label"])

    def describe(self, index: int) -> str:
        """See ImageSource."""
        return f"{self.place}, image {index}"

    def identity(self) -> str:
        """See ImageSource."""
        return self._identity


class TFDSDocuments:
    """The text of a TFDS random-access source; several splits may be joined by '+'.

    Raises:
      InputError: the split is empty, or was not prepared for random access.
    """

    def __init__(self, builder: Any, name: str, split: str):
        self.place = f"{name}, split {split}"
        self._identity = f"{builder.info.full_name}, split {split}"
        if not sum(builder.info.splits[part].num_examples for part in split.split("+")):
            raise InputError(
                f"data.name: expected documents in {self.place}, found none; use another set or "
                "split."
            )
        try:
            self.records = builder.as_data_source(split=split)
        except NotImplementedError:
            raise InputError(
                f"data.name: expected {name} as array_record files, found another format in "
                f"{builder.data_dir}; add them with "
                f"tfds convert_format --dataset_version_dir={builder.data_dir} "
                "--out_file_format=array_record."
            ) from None

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> str:
        """See DocumentSource."""
        text = self.records[index]["text"]
        # One damaged document among millions should not end a run days after it began.
        return clean_text(text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text))

    def identity(self) -> str:
        """See DocumentSource."""
        return self._identity


@source("tfds")
def tfds_splits(config: DataConfig) -> Splits:
    """A TFDS set by name, read with `tfds.data_source`: sets with image and label are classified, a
    text set whose training split is one example is that text, and other text sets are documents.
    """
    require("tensorflow_datasets", "for data.source=tfds")
    import tensorflow_datasets as tfds

    if not config.name:
        raise InputError(
            "data.name: expected a TFDS name such as tiny_shakespeare for data.source=tfds; add "
            "--config.data.name=NAME."
        )
    if config.data_dir is not None and not os.path.isdir(Path(config.data_dir).expanduser()):
        raise InputError(
            f"data.data_dir: no directory at {config.data_dir}; give the folder that holds "
            f"{config.name}/VERSION/, or leave it out."
        )
    builder = _tfds_builder(tfds, config)
    splits = list(builder.info.splits)
    features = builder.info.features or {}
    validation = config.validation_split or ("validation" if "validation" in splits else "test")
    is_text = "text" in features and isinstance(features["text"], tfds.features.Text)
    documents = is_text and "train" in splits and builder.info.splits["train"].num_examples != 1
    if documents and not config.validation_split and validation not in splits:
        return DocumentSplits(TFDSDocuments(builder, config.name, "train"), None)
    wanted = {"train": ["train"], "validation": validation.split("+")}
    for split in [*wanted["train"], *wanted["validation"]]:
        if split not in splits:
            raise InputError(
                f"data.validation_split: {config.name} has no split '{split}'; it has "
                f"{', '.join(splits)}."
            )
    if documents:
        return DocumentSplits(
            *(TFDSDocuments(builder, config.name, split) for split in ("train", validation))
        )
    if is_text:
        read = {
            split: builder.as_data_source(split=split)
            for group in wanted.values()
            for split in group
        }
        joined = {
            k: "".join(_text(x["text"]) for split in group for x in read[split])
            for k, group in wanted.items()
        }
        return TextSplits(joined["train"], joined["validation"])
    if "image" in features and "label" in features:
        if len(wanted["validation"]) != 1:
            raise InputError("data.validation_split: give one split for an image set.")
        train, held_out = (
            TFDSImages(builder, config.name, split) for split in ("train", wanted["validation"][0])
        )
        test = (
            TFDSImages(builder, config.name, "test")
            if "test" in splits and wanted["validation"] != ["test"]
            else None
        )
        return image_splits(train, held_out, test, train.labels, config)
    raise InputError(
        f"data.name: {config.name} has features {sorted(features)}; expected a text named 'text', "
        "or 'image' and 'label'; use another set."
    )


def _tfds_builder(tfds: Any, config: DataConfig) -> Any:
    where = config.data_dir or "TFDS's default folder"
    kwargs = (
        {} if config.data_dir is None else {"data_dir": str(Path(config.data_dir).expanduser())}
    )
    try:
        builder = tfds.builder(config.name, file_format="array_record", try_gcs=False, **kwargs)
    except Exception as error:
        try:  # a set that is prepared on disk but unknown to this TFDS
            builder = tfds.builder_from_directory(_prepared_folder(config))
        except Exception:
            raise InputError(
                f"data.name: TFDS cannot open '{config.name}' in {where} ({type(error).__name__}: "
                f"{first_line(error)})."
            ) from None
    if builder.info.splits:
        return builder
    if config.data_dir is not None or not config.download:
        raise InputError(
            f"data.data_dir: {where} holds no prepared '{config.name}'. Prepare it there (tfds "
            f"build {config.name} --file_format=array_record), "
            "give another folder, or leave data_dir out and let TFDS download it."
        )
    _check_reachable(builder, config.name)
    logging.warning(
        "data.name: '%s' is not prepared in %s; TFDS downloads it now. Where a folder has it, stop "
        "this and give --config.data.data_dir=FOLDER.",
        *(config.name, _root(builder)),
    )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise InputError(
            f"data.name: '{config.name}' is not prepared in {where} and could not be downloaded "
            f"({type(error).__name__}: {first_line(error)}). "
            "Give the folder that holds it with --config.data.data_dir=FOLDER, or prepare it "
            f"with: tfds build {config.name} --file_format=array_record"
        ) from None
    return builder


def _root(builder: Any) -> Path:
    """The folder that holds NAME/VERSION/ of a set, and what was downloaded."""
    folder = Path(builder.data_dir)
    return folder.parents[len(Path(builder.info.full_name).parts) - 1]


def _check_reachable(builder: Any, name: str) -> None:
    """Raises InputError if a set can be downloaded from nowhere: TFDS would try for minutes."""
    kept = (_root(builder) / "downloads").rglob("*")
    if any(p.is_file() and ".tmp." not in p.name and p.suffix != ".INFO" for p in kept):
        return  # perhaps it is there already
    urls = [urlsplit(url) for url in getattr(builder, "url_infos", {})]
    places = {(url.hostname, url.port or _PORTS[url.scheme]) for url in urls if _is_plain(url)}
    if not places:
        return
    reason = ""
    for host, port in sorted(places)[:_HOSTS]:
        try:
            socket.create_connection((host, port), timeout=_PATIENCE).close()
        except (OSError, UnicodeError) as error:
            said = why(error) if isinstance(error, OSError) else first_line(error)
            reason = reason or f"{host}: {said}"
        else:
            return
    raise InputError(
        f"data.data_dir: '{name}' is not prepared in {_root(builder)}, and cannot be downloaded "
        f"({reason}). Give the folder that holds {name}/VERSION/ with --config.data.data_dir="
        f"FOLDER, or prepare it where there is a network: tfds build {name} "
        "--file_format=array_record --data_dir=FOLDER."
    )


def _is_plain(url: SplitResult) -> bool:
    """Whether a file is fetched from its host by this machine itself, and by no proxy."""
    proxied = url.scheme in getproxies() and not proxy_bypass(url.hostname or "")
    return bool(url.hostname) and url.scheme in _PORTS and not proxied


def _prepared_folder(config: DataConfig) -> str:
    versions = sorted(
        p
        for p in (Path(config.data_dir or "~/tensorflow_datasets").expanduser() / config.name).glob(
            "*.*.*"
        )
        if os.path.isdir(p)
    )
    return str(versions[-1])


def _text(value: Any) -> str:
    return clean_text(value.decode("utf-8") if isinstance(value, bytes) else str(value))
