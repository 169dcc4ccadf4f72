"""Checkpoints of vision transformers for tests: weights in timm's names, and files as torch.save
writes them, made without torch.
"""

import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from unittest import mock

import ml_dtypes
import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
BFLOAT16 = ml_dtypes.bfloat16


def weights(width=64, depth=1, patch=4, grid=2, classes=5, ratio=2, channels=3, seed=0):
    """Random weights of a small DeiT, timm's names and layout."""
    draw = np.random.default_rng(seed)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }
    for i in range(depth):
        for name, (rows, columns) in {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (ratio * width, width),
            "mlp.fc2": (width, ratio * width),
        }.items():
            shapes |= {
                f"blocks.{i}.{name}.weight": (rows, columns),
                f"blocks.{i}.{name}.bias": (rows,),
            }
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
    return {
        name: draw.normal(0.3 * ("norm" in name), 0.1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


class Parameter:
    """Saved as torch saves a parameter."""

    def __init__(self, value):
        self.value = value


class _Storage:
    def __init__(self, key, numbers):
        self.key, self.numbers = key, numbers


class _Pickler(pickle.Pickler):
    """Arrays become tensors; a view shares its base's storage."""

    def __init__(self, file, torch, legacy):
        super().__init__(file, protocol=2)
        self.torch, self.legacy, self.storages = torch, legacy, {}

    def persistent_id(self, obj):
        if isinstance(obj, _Storage):
            kind = getattr(self.torch, STORAGES[str(obj.numbers.dtype)])
            return ("storage", kind, obj.key, "cpu", obj.numbers.size) + (
                (None,) if self.legacy else ()
            )
        return None

    def reducer_override(self, obj):
        if isinstance(obj, Parameter):
            return self.torch._utils._rebuild_parameter, (obj.value, True, OrderedDict())
        if not isinstance(obj, np.ndarray):
            return NotImplemented
        base = obj
        while getattr(base, "base", None) is not None:
            base = base.base
        key = str(len(self.storages))
        storage = self.storages.setdefault(id(base), _Storage(key, base))
        places = (obj.ctypes.data - base.ctypes.data) // obj.itemsize
        strides = tuple(s // obj.itemsize for s in obj.strides)
        return self.torch._utils._rebuild_tensor_v2, (
            storage,
            places,
            obj.shape,
            strides,
            False,
            OrderedDict(),
        )


def _fake_torch():
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *_: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    torch._utils = utils
    return torch, utils


def save_torch(path, content, legacy=False, big_endian=False, compression=zipfile.ZIP_STORED):
    """Writes content, NumPy arrays for tensors, in torch.save's zip format or in the one before
    1.6.
    """
    torch, utils = _fake_torch()
    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        name = path.with_suffix(".pickle")
        with open(name, "wb") as file:
            pickler = _Pickler(file, torch, legacy)
            pickler.dump(content)
    pickled = name.read_bytes()
    name.unlink()
    storages = {
        s.key: s.numbers.byteswap().tobytes() if big_endian else s.numbers.tobytes()
        for s in pickler.storages.values()
    }
    if legacy:
        sizes = {s.key: s.numbers.size for s in pickler.storages.values()}
        header = [
            0x1950A86A20F9469CFC6C,
            1001,
            {"protocol_version": 1001, "little_endian": not big_endian},
        ]
        data = (
            b"".join(pickle.dumps(part, 2) for part in header)
            + pickled
            + pickle.dumps(sorted(storages), 2)
        )
        path.write_bytes(
            data
            + b"".join(struct.pack("<q", sizes[key]) + storages[key] for key in sorted(storages))
        )
        return path
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "big" if big_endian else "little")
        for key, value in storages.items():
            archive.writestr(f"archive/data/{key}", value)
        archive.writestr("archive/version", "3\n")
    return path
