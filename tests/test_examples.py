"""The example of every docstring of the package runs."""

import doctest
import importlib
from pathlib import Path

import pytest

import polysrl_dc

MODULES = sorted(path.stem for path in Path(polysrl_dc.__file__).parent.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name):
    assert doctest.testmod(importlib.import_module(f"polysrl_dc.{name}")).failed == 0
