"""`benchmarks/torture.py` for half a minute: whatever is damaged, commands succeed or say what is wrong."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes pipes, and watches /proc")
def test_damaged_files_end_in_sentences():
    done = subprocess.run(
        [sys.executable, "benchmarks/torture.py", "--minutes=0.5", "--seed=0", "--cases=30"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    said = re.search(r"(\d+) cases, 0 failures", done.stdout)
    assert said is not None and int(said[1]) > 0
