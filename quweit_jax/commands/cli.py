"""What commands share: arguments, errors printed as sentences, joining several processes."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import logging as standard_logging
import os
import platform
import signal
import sys
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quweit_jax.config import Config, load_file, set_value
from quweit_jax.errors import EXTRAS, InputError, RunError, missing
from quweit_jax.reading import shown, why, without_surrogates

# of glibc's mallopt
_MALLOC_TRIM_THRESHOLD, _MALLOC_TOP_PAD, _MALLOC_MMAP_MAX = -1, -2, -4
INTERRUPTED = 128 + signal.SIGINT  # the status of what Ctrl-C ended before it was done


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command; our own errors end it with their message alone and status 2 or 1, an
    interrupt from the terminal with a sentence and status 130, and what the system refuses
    (OSError) with what it says and status 1.
    """
    from absl import logging

    logging.set_verbosity(logging.WARNING)
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(_Plain())
    keep_compiled()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A letter that a terminal cannot write does not end the work.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2 if isinstance(error, InputError) else 1
        _leave(error, status)
        sys.exit(status)
    except ModuleNotFoundError as error:  # of a room that needs an extra
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"error: {missing(package, 'for this command')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; the same command begins again, or goes on", file=sys.stderr)
        _leave(KeyboardInterrupt(), INTERRUPTED)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a disk or a folder that fails where nothing better can be said
        where = f": {shown(error.filename)}" * (error.filename is not None)
        print(f"error: {why(error)}{where}; mend that, and try again", file=sys.stderr)
        _leave(error, 1)
        sys.exit(1)
    except Exception as error:  # a mistake of ours
        traceback.print_exc()
        _leave(error, 1)
        sys.exit(1)


def _leave(error: BaseException, status: int) -> None:
    """Ends this process at once if it is one of several and alone in what is wrong."""
    if hosts := sys.modules.get("quweit_jax.training.hosts"):
        hosts.leave(error, status)


def keep_compiled() -> None:
    """Lets JAX, which is not imported yet, keep compiled programs in the user's cache folder, for
    this process and those it starts: `$XDG_CACHE_HOME/quweit_jax`, by default
    `~/.cache/quweit_jax`.

    Where JAX_COMPILATION_CACHE_DIR is set, that is the folder; empty, or with
    JAX_ENABLE_COMPILATION_CACHE=false, nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    above = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(above):  # as `ops.kernels.native`, which would import JAX
        above = os.path.expanduser("~/.cache")
    folder = os.path.join(above, "quweit_jax", f"compiled-{_processor()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError:  # a home that is not there, or cannot be written to
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder


def keep_memory() -> None:
    """Lets this process keep the memory that it frees, and take it again, for as long as it lives.

    A training step on a CPU frees and takes buffers of many megabytes. By default glibc gives each
    back to the system, which then hands out pages anew, one fault after the other: a quarter to a
    third of the CPU time of a small model's step (`benchmarks/kept_memory.py`). Other C libraries
    are left as they are, and so is glibc where an environment variable (MALLOC_...,
    GLIBC_TUNABLES) says how it should allocate.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if _has_glibc() else None
    if set_option is None:
        return
    set_option(_MALLOC_MMAP_MAX, 0)  # no buffer has a mapping of its own, whatever its size
    set_option(_MALLOC_TRIM_THRESHOLD, -1)  # nothing is given back
    set_option(_MALLOC_TOP_PAD, 64 << 20)  # what is taken is taken in pieces of at least that many


def _has_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def _processor() -> str:
    """A name that differs for processors of other instructions: programs compiled for one may not
    run on another, and one home folder may serve both.
    """
    told = platform.machine() + platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        told += next((line for line in file if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{zlib.crc32(told.encode()):08x}"


class _Plain(standard_logging.Formatter):
    """'warning: ...' instead of absl's line numbers."""

    def format(self, record: standard_logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.path=value` (or `--config.path value`) out of the arguments."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    pieces = list(argv)
    while pieces:
        piece = pieces.pop(0)
        if not piece.startswith("--config."):
            rest.append(piece)
            continue
        key, equals, value = piece[len("--config.") :].partition("=")
        if not equals:
            if not pieces or pieces[0].startswith("--"):
                raise InputError(f"{piece}: expected a value; write {piece}=VALUE.")
            value = pieces.pop(0)
        overrides[key] = value
    return rest, overrides


_OPTIONS: dict[str, dict[str, Any]] = {
    "config": {"help": "FILE.py[:VARIANT,key=value,...]", "required": True},
    "workdir": {"help": "the run directory", "required": True},
    "step": {"type": int, "help": "a checkpoint's step (default: that of lowest validation loss)"},
    "packed": {
        "action": "store_true",
        "help": "as deployed: 1-bit tables, int8 sums, ternary weights at 2 bits; integer models "
        "alone",
    },
    "json": {"action": "store_true", "help": "one JSON object on standard output"},
}


def parser(name: str, description: str, *shared: str) -> argparse.ArgumentParser:
    """An argument parser for `python -m quweit_jax NAME`.

    shared: names of options that several commands have, which are added.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m quweit_jax {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for option in shared:
        made.add_argument(f"--{option}", **_OPTIONS[option])
    return made


def parse(
    made: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The arguments, and apart from them the values given to keys of the config.

    Raises:
      InputError: one that a run would have to write down is not UTF-8.
    """
    rest, overrides = split_overrides(argv)
    args = made.parse_args(rest)
    for name, value in {**vars(args), **{f"config.{k}": v for k, v in overrides.items()}}.items():
        for text in value if isinstance(value, list) else [value]:
            if name not in ("prompt", "runs") and without_surrogates(str(text)) != str(text):
                raise InputError(f"--{name}: expected UTF-8, found {str(text)!r}; rename it.")
    return args, overrides


def load_config(spec: str, overrides: Mapping[str, str]) -> Config:
    """The config of an experiment file, 'FILE.py:VARIANT,key=value', with values of its keys."""
    config = load_file(spec)
    for path, text in overrides.items():
        set_value(config, path, text)
    return config


def print_facts(facts: Mapping[str, object], *, as_json: bool) -> None:
    """Prints names and values, a line each, or all as one JSON object."""
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, float):
            value = f"{value:,.0f}" if value >= 1e6 else f"{value:.6g}"
        print(f"{name:>{width}}: {f'{value:,}' if isinstance(value, int) else value}")


def join_processes() -> None:
    """`jax.distributed` when launched on several processes.

    By environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; on a TPU pod or
    under a launcher JAX knows, JAX_DISTRIBUTED=1 lets it find them itself. QUWEIT_HEARTBEAT_TIMEOUT
    is the time, in seconds, after which a process that is not heard of counts as dead.
    """
    from quweit_jax.training import hosts

    if "JAX_NUM_PROCESSES" in os.environ:
        missing = [v for v in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID") if v not in os.environ]
        if missing:
            raise InputError(
                f"JAX_NUM_PROCESSES is set without {' and '.join(missing)}; set all three on every "
                "process, or none."
            )
        try:
            count, number = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        except ValueError:
            raise InputError(
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID: expected whole numbers such as 2 and 0, "
                f"found '{os.environ['JAX_NUM_PROCESSES']}' and '{os.environ['JAX_PROCESS_ID']}'."
            ) from None
        if not 0 <= number < count:
            raise InputError(
                f"JAX_PROCESS_ID: expected 0 to {count - 1}, as JAX_NUM_PROCESSES is {count}, "
                f"found {number}."
            )
        hosts.join(os.environ["JAX_COORDINATOR_ADDRESS"], count, number)
    elif os.environ.get("JAX_DISTRIBUTED") == "1":
        hosts.join()
