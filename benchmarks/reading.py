"""How fast training batches of text are read: tokens a second by kind of file, tokenizer and
threads.

python benchmarks/reading.py [--megabytes=8] [--out=FILE.txt]

The corpus is Python's own library, a document a file. 'wall' is tokens a second as a training loop
would get them, 'cpu' tokens a second of one core's work: what the former is on cores that nothing
else uses. --out also writes FILE.json.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import timing

from quweit_jax.data import pipeline, text
from quweit_jax.data.registry import DataConfig

BATCH, CONTEXT, FILES = 32, 2048, 16
KINDS = ("txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow")


def documents(megabytes: float) -> list[str]:
    found, left = [], megabytes * 1e6
    for path in text._python_files(Path(text.sysconfig.get_paths()["stdlib"])):
        try:
            found.append(path.read_text("utf-8"))
        except UnicodeDecodeError:
            continue
        left -= len(found[-1])
        if left < 0:
            break
    return found


def write(folder: Path, kind: str, texts: list[str]) -> None:
    """Documents in FILES files of a kind; .txt: in one each."""
    folder.mkdir(parents=True)
    if kind == "txt":
        for i, document in enumerate(texts):
            (folder / f"{i:06d}.txt").write_text(document, encoding="utf-8")
        return
    names = []
    for number in range(FILES):
        part = texts[number::FILES]
        names.append(f"part-{number:03d}.{kind}")
        path, table = folder / names[-1], pa.table({"text": part})
        lines = "".join(json.dumps({"text": document}) + "\n" for document in part).encode()
        if kind == "parquet":
            parquet.write_table(table, path, compression="zstd")
        elif kind == "arrow":
            with pa.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table, max_chunksize=1000)
        elif kind == "jsonl.zst":
            with pa.CompressedOutputStream(str(path), "zstd") as stream:
                stream.write(lines)
        else:
            path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)
    if kind == "arrow":
        state = {"_data_files": [{"filename": name} for name in names]}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")


def rate(folder: Path, tokenizer: str, threads: int, seconds: float) -> dict[str, float]:
    config = DataConfig(
        "document_folder",
        path=str(folder),
        tokenizer=tokenizer,
        threads=threads,
        validation_tokens=4096,
    )
    data = pipeline.load(config, CONTEXT)
    batches = pipeline.train_batches(data.train, BATCH, 0)
    next(batches)
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds or count < 4:
        next(batches)
        count += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = count * BATCH * CONTEXT
    return {"wall": tokens / wall, "cpu": tokens / cpu}


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--megabytes", type=float, default=8.0)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    args = parser.parse_args()
    texts = documents(args.megabytes)
    lines = [
        f"{len(texts)} documents of Python's library, {sum(map(len, texts)) / 1e6:.1f} MB, in "
        f"{FILES} files (txt: one each); batches of {BATCH} texts of {CONTEXT} tokens",
        timing.machine(("grain", "tokenizers", "pyarrow", "numpy")) + "; a machine that was busy",
        f"{'files':10} {'tokenizer':9} {'threads':>7} {'wall, tokens/s':>15} {'cpu, tokens/s':>15}",
    ]
    print("\n".join(lines), flush=True)
    found = []
    with tempfile.TemporaryDirectory() as root:
        for kind in KINDS:
            write(Path(root) / kind / "train", kind, texts)
            write(Path(root) / kind / "validation", kind, texts[:64])
            for tokenizer in ("byte", "bpe"):
                for threads in (1, 2, 4):
                    row = rate(Path(root) / kind, tokenizer, threads, args.seconds)
                    found.append({"files": kind, "tokenizer": tokenizer, "threads": threads, **row})
                    shown = f"{row['wall']:15,.0f} {row['cpu']:15,.0f}"
                    lines.append(f"{kind:10} {tokenizer:9} {threads:7} {shown}")
                    print(lines[-1], flush=True)
    timing.write(args.out, lines)
    timing.write_json(args.out, {"rows": found})


if __name__ == "__main__":
    main()
