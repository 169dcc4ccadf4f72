"""`benchmarks/torture.py` and `benchmarks/failing_disk.py` for a few cases: whatever is damaged or
fails, commands succeed or say what is wrong, and a run goes on as if nothing had been.
"""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="makes pipes, forks, and watches /proc"
)


def cases_without_failure(*command: str) -> int:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    said = re.search(r"(\d+) cases, 0 failures", done.stdout)
    assert said is not None
    return int(said[1])


def test_damaged_files_end_in_sentences():
    assert cases_without_failure("benchmarks/torture.py", "--minutes=0.5", "--cases=30") > 0


def test_a_run_survives_a_file_system_that_fails():
    """Two of these cases once ended with a raw error where the folder could not be listed."""
    assert cases_without_failure("benchmarks/failing_disk.py", "--seed=0", "--cases=7") == 7
