"""The examples of the docstrings run: those of the package and of the benchmarks."""

import doctest
import importlib
from pathlib import Path

import pytest

import polysrl_dc

PACKAGE = Path(polysrl_dc.__file__).parent
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = [
    prefix + path.stem
    for folder, prefix in [(PACKAGE, "polysrl_dc."), (BENCHMARKS, "")]
    for path in sorted(folder.glob("[a-z]*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed
