"""Data sets that matminer describes: downloaded once, resumed, and checked by their SHA-256.

Matminer itself downloads without a time-out, checks a file only when it has just been downloaded,
and keeps one that was refused. Here a file is fetched only where a data set is asked for, into
matminer's own cache, and takes its name when its checksum is right. ``POLYSRL_OFFLINE`` forbids
all connections.
"""

from __future__ import annotations

import os
from pathlib import Path

import matbench.data_ops
import pandas as pd
import requests
from folds import locked
from matminer import datasets
from tqdm import tqdm

from polysrl_dc.errors import InvalidInputError
from polysrl_dc.sources import file_digest

OFFLINE = "POLYSRL_OFFLINE"
TIMEOUT = (10, 60)
"""Seconds to connect, and between two pieces of the content."""


def load_official(name: str) -> pd.DataFrame:
    """The table of a Matbench task with Matbench's own ids."""
    ensure_dataset(name)
    return matbench.data_ops.load(name)


def load_dataset(name: str) -> pd.DataFrame:
    """The table of a data set of matminer."""
    ensure_dataset(name)
    return datasets.load_dataset(name, download_if_missing=False)


def ensure_dataset(name: str) -> Path:
    """The file of a data set in matminer's cache (``MATMINER_DATA``), downloaded if missing.

    Raises
    ------
    InvalidInputError
        The file has not the checksum that matminer gives.
    FileNotFoundError
        It is missing, and ``POLYSRL_OFFLINE`` is set.
    OSError
        The download failed; the next call continues it.
    """
    digest = datasets.get_dataset_attribute(name, "hash")
    url = datasets.get_dataset_attribute(name, "url")
    home = Path(os.environ.get("MATMINER_DATA", Path(datasets.__file__).parent)).expanduser()
    path = home / f"{name}.{datasets.get_dataset_attribute(name, 'file_type')}"
    if not path.exists():
        if os.environ.get(OFFLINE):
            raise FileNotFoundError(f"{path} is missing and {OFFLINE} is set; it comes from {url}")
        with locked(home):
            if not path.exists():
                fetch(url, path, digest)
    if file_digest(path) != digest:
        raise InvalidInputError(f"{path} has not the SHA-256 {digest} of {url}; remove it")
    return path


def fetch(url: str, path: Path, digest: str) -> None:
    """Download a file, going on where an interrupted download has stopped.

    Parameters
    ----------
    url : str
    path : path
        Where it goes once it is complete; until then its content is in ``<path>.part``.
    digest : str
        Its SHA-256, hexadecimal.
    """
    part = path.with_name(f"{path.name}.part")
    done = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code != requests.codes.requested_range_not_satisfiable:
            answer.raise_for_status()
            more = answer.status_code == requests.codes.partial_content
            with open(part, "ab" if more else "wb") as file, _bar(path, answer) as bar:
                for piece in answer.iter_content(2**12):  # what an interruption loses at most
                    file.write(piece)
                    bar.update(len(piece))
    if file_digest(part) != digest:
        part.unlink()
        raise InvalidInputError(f"what {url} sends has not the SHA-256 {digest}")
    os.replace(part, path)


def _bar(path: Path, answer: requests.Response) -> tqdm:
    size = int(answer.headers.get("Content-Length", 0)) or None
    return tqdm(desc=path.name, total=size, unit="B", unit_scale=True, disable=None)
