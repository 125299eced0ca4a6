"""Fixtures shared by all tests: where real data lie, a cache of their own, and fixed seeds."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing import Tally

ROOT = Path(__file__).resolve().parents[1]


COUNTS = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--deep``: as many generated inputs, kills and damaged files as the README states."""
    parser.addoption("--deep", action="store_true", help="minutes to hours of generated trouble")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests that generate their cases have counted."""
    counts = terminalreporter.config.stash[COUNTS]
    if counts:
        terminalreporter.section("generated cases")
        for what, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count:>7,} {what}")


def pytest_configure(config: pytest.Config) -> None:
    """Keep torch on one thread: the tensors of the tests are small, and sums stay repeatable."""
    torch.set_num_threads(1)
    config.stash[COUNTS] = Counter()


@pytest.fixture(scope="session")
def counts(request: pytest.FixtureRequest) -> Counter[str]:
    """What was generated and what became of it, printed when all tests have run."""
    return request.config.stash[COUNTS]


@pytest.fixture
def tally(counts: Counter[str]) -> Tally:
    """Of the inputs of one test."""
    return Tally(counts)


@pytest.fixture(scope="module")
def encoder() -> Any:
    """The shipped model, which has both encoders."""
    from polysrl_dc import PolySRLModel

    return PolySRLModel.from_pretrained("polysrl-mp")


@pytest.fixture(scope="session")
def deep(request: pytest.FixtureRequest) -> bool:
    """Whether generated cases should be many (``--deep``) or few."""
    return bool(request.config.getoption("--deep"))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_structures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Pack structures into a temporary folder, not the home folder, unless POLYSRL_CACHE is set."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("POLYSRL_CACHE"):
            patch.setenv("POLYSRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  DeepChem draws from NumPy's global generator
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data (``matbench/``, ``mp/``, ``wetlab/``); skips where there is none."""
    given = os.environ.get("POLYSRL_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if given:
            pytest.fail(f"POLYSRL_DATA names {folder}, which is not a folder")
        pytest.skip(f"no real data: POLYSRL_DATA is not set and {folder} does not exist")
    return folder
