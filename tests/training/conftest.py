"""Whole runs in tests spend their time compiling, and none of them measures speed."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly: None) -> None:
    """In every test here."""
