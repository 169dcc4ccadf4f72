"""The C file of a trained classifier of tables against its packed form in JAX, on one core.

taskset -c 0 python benchmarks/hardware_c.py (--workdir=RUN | --data_dir=FOLDER) [--rounds=15]
    [--images=10000] [--compiler=gcc] [--out=FILE]

The classifier is a run's, or the box's `mnist-dwn` on TFDS's prepared mnist in FOLDER.

Both classify the same validation images in one process, in turn: the packed model from float32
images, as it takes them, and the C functions from words (what input_scaling.json makes of images;
making them is timed by itself). Decisions are compared first; with any difference the status is 1.
Beside that, the size of the compiled file, and of files of the sizes of published classifiers,
whose tables are drawn and not trained: a size does not depend on what is in them.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quweit_jax import pretrained
from quweit_jax.data import pipeline
from quweit_jax.data.pipeline import eval_batches
from quweit_jax.data.registry import DataConfig
from quweit_jax.deploy.hardware import c_source, circuit, description
from quweit_jax.deploy.hardware.description import Classifier
from quweit_jax.deploy.pack import pack
from quweit_jax.models.dwn import DWN, DWNConfig
from quweit_jax.ops.kernels import choice
from quweit_jax.training import rundir

PUBLISHED = (690, 2050, 4080, 4600)  # tables; arXiv 2410.11112
# examples at a time, and how the file is compiled
FORMS = (
    (64, "-O2"),
    (64, "-O3"),
    (256, "-O3"),
    (256, "-O3 -march=native"),
    (512, "-O3 -march=native"),
)
MOST = max(word for word, _ in FORMS)


def compiled(classifier: Classifier, place: Path, flags: str, compiler: str, word: int) -> Path:
    """The classifier's C file, compiled."""
    ports = circuit.build(classifier).ports()
    (place / "dwn.c").write_text(c_source.source(classifier, ports, "dwn", word))
    out = place / ("dwn.so" if "-shared" in flags else "dwn.o")
    subprocess.run(
        [compiler, "-std=c99", *flags.split(), "-o", out, "dwn.c"], cwd=place, check=True
    )
    return out


def size(classifier: Classifier, compiler: str) -> int:
    """Bytes of code and constants, by `size`."""
    with tempfile.TemporaryDirectory() as place:
        made = compiled(classifier, Path(place), "-Os -c", compiler, 64)
        said = subprocess.run(["size", made], capture_output=True, text=True, check=True).stdout
    text, data, bss = (int(field) for field in said.splitlines()[1].split()[:3])
    return text + data + bss


def drawn(tables: int, inputs: np.ndarray) -> Classifier:
    """A classifier of a published size that is not trained."""
    config = DWNConfig(10, (tables,), 6, thermometer="uniform", thermometer_bits=3)
    model = DWN(config)
    packed = pack(model, jax.device_get(model.init(jax.random.key(0), inputs[:64])), inputs[:64])
    return description.from_packed(model, packed, inputs, 4)[0]


def images(examples: Any, limit: int = 0) -> np.ndarray:
    """Inputs (N, ...) float32 of a split."""
    batches = eval_batches(examples, 250, -(-limit // 250) if limit else 0)
    return np.concatenate([batch["inputs"][batch["weights"] > 0] for batch in batches])


def opened(workdir: Path | None, data_dir: str | None) -> tuple[Any, Any, Any]:
    """The model, its packed variables, and its data."""
    if workdir:
        run = rundir.open_run(workdir, None, {})
        return (
            run.setup.model,
            pack(run.setup.model, run.variables, run.setup.init_inputs),
            (run.setup.data),
        )
    mnist = DataConfig(source="tfds", name="mnist", data_dir=data_dir)
    return *pretrained.load("mnist-dwn"), pipeline.load(mnist)


def main() -> int:
    parser = timing.parser(__doc__, rounds=15)
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--workdir", type=Path)
    of.add_argument("--data_dir")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--compiler", default="gcc")
    args = parser.parse_args()
    model, packed, data = opened(args.workdir, args.data_dir)
    training = images(data.train)
    classifier, _ = description.from_packed(model, packed, training)
    ports, scaling = circuit.build(classifier).ports(), classifier.scaling
    shown = images(data.validation)[: args.images]
    count, padded = len(shown), -(-len(shown) // MOST) * MOST
    flat = shown.reshape(count, -1)[:, ports]
    kind = np.dtype(c_source.word_type(scaling.bits, scaling.signed).removesuffix("_t"))
    words = np.zeros((padded, len(ports)), kind)
    words[:count] = scaling.words(flat)
    decision, score = (np.zeros(padded, np.uint32) for _ in range(2))
    one_of = np.zeros(count, np.int64)
    libraries = {}
    for word, flags in FORMS:
        with tempfile.TemporaryDirectory() as place:
            shared = f"{flags} -shared -fPIC"
            made = compiled(classifier, Path(place), shared, args.compiler, word)
            libraries[word, flags] = ctypes.CDLL(str(made))
    given, chosen, counted = (a.ctypes.data for a in (words, decision, score))
    row = words.strides[0]

    def many(form: tuple[int, str]) -> None:
        for start in range(0, padded, form[0]):
            libraries[form].dwn_many(
                ctypes.c_void_p(given + start * row),
                ctypes.c_void_p(chosen + 4 * start),
                ctypes.c_void_p(counted + 4 * start),
            )

    def one() -> None:
        for i in range(count):
            one_of[i] = libraries[FORMS[0]].dwn_one(
                ctypes.c_void_p(given + i * row), ctypes.c_void_p(counted + 4 * i)
            )

    apply = jax.jit(lambda x: model.apply(packed, x).argmax(-1))
    on_device = jax.device_put(shown)

    def in_jax() -> np.ndarray:
        return np.asarray(apply(on_device))

    with choice.compiling_for("cpu", portable=True):  # without native code
        portable = jax.jit(lambda x: model.apply(packed, x).argmax(-1)).lower(on_device).compile()

    def by_xla() -> np.ndarray:
        return np.asarray(portable(on_device))

    expected = in_jax()
    one()
    differ = int((one_of != expected).sum() + (by_xla() != expected).sum())
    for form in FORMS:
        decision[:] = 0
        many(form)
        differ += int((decision[:count] != expected).sum())
    base = "packed, JAX by XLA"
    contenders = {
        base: by_xla,
        "packed, JAX by native code": in_jax,
        **{f"C, {word} at a time, {flags}": partial(many, (word, flags)) for word, flags in FORMS},
        f"C, one at a time, {FORMS[0][1]}": one,
        "words of images, NumPy": lambda: scaling.words(flat),
    }
    found = timing.summary(timing.samples(contenders, args.rounds))
    sizes = {
        str(tables): size(drawn(tables, training[:2000]), args.compiler) for tables in PUBLISHED
    }
    own = size(classifier, args.compiler)
    lines = [
        timing.machine(),
        timing.cores(),
        f"{count:,} validation images, {sum(len(l.tables) for l in classifier.layers):,} tables, "
        f"{len(classifier.feature):,} comparators, words of {scaling.bits} bits: {differ} "
        f"decisions of {(2 + len(FORMS)) * count:,} differ from the packed model's; "
        f"{args.compiler}",
        timing.spread_table(found, base),
        f"compiled with -Os, code and constants: {own:,} bytes",
        "of the published sizes, tables of 6 inputs, 3 thresholds a pixel: "
        + ", ".join(f"{int(n):,} tables {bytes_:,}" for n, bytes_ in sizes.items()),
    ]
    print("\n".join(lines))
    timing.write(args.out, lines)
    facts = {"images": count, "different": differ, "times": found, "bytes": own, "published": sizes}
    timing.write_json(args.out, {"machine": timing.machine(), **facts})
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
