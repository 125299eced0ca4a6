"""Fixtures shared by all tests: where real data lie, a cache of their own, and fixed seeds."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Keep torch on one thread: the tensors of the tests are small, and sums stay repeatable."""
    torch.set_num_threads(1)


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
