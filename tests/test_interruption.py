"""Every runner killed at random moments, run twice at once, and without a place to write to."""

import errno
import fcntl
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pretrain
import pytest
import search
from folds import _tied, locked, output_folder
from interruptions import Found, outcome
from processes import PRETRAIN
from runners import RUNNERS
from targets import Target

from polysrl_dc.checkpoints import write_atomic

FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=RUNNERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def found(name: str, deep: bool, data_dir: Path) -> Found:
    result = outcome(deep, data_dir)[name]
    assert not result.error, result.error
    return result


def test_a_run_that_was_killed_ends_like_any_other(found, counts):
    counts["random kills"] += found.kills
    counts["finished folds lost to kills"] += len(found.lost)
    counts["results that differ after a restart"] += len(found.differ)
    assert found.kills > 0
    assert found.lost == [] and found.differ == []


def test_runs_at_once_in_one_folder_do_not_mix(name, found):
    assert found.at_once.keys() == {"itself"} | ({"another"} if RUNNERS[name].beside else set())
    for both in found.at_once.values():
        assert both["differ"] == [] and "Traceback" not in both["stderr"]
        assert both["status"] == ([0, 2] if RUNNERS[name].alone else [0, 0])
        assert RUNNERS[name].alone == ("another run is writing there" in both["stderr"])


@pytest.mark.parametrize("disk", ["no folder", "read-only", "full"])
def test_a_place_that_cannot_be_written_is_one_line(name, found, disk):
    refused = found.refused[disk]
    assert refused["differ"] == [], "what was finished is there no longer"
    last = refused["stderr"].strip().splitlines()[-1]
    if RUNNERS[name].command:
        assert refused["status"] in (1, 2) and "Traceback" not in refused["stderr"]
        assert "rror" in last or "Errno" in last
    if disk == "full":
        assert "too large" in last  # a limit stands for the size of the disk
    else:
        assert refused["begun"] == [], "trained in vain"
        assert refused["folder"] in last


def test_a_row_of_the_search_is_kept_until_it_is_written(tmp_path, monkeypatch, data_dir):
    formulas, values = np.array(["NaCl", "KCl", "MgO", "CaO", "LiF", "TiO2"]), np.arange(6.0)
    target = Target("small", "eV", formulas, values, 1.0, 8)
    monkeypatch.setattr(search, "wetlab_targets", lambda _: [target])
    monkeypatch.setattr(search, "BUDGET", [*PRETRAIN, "--epochs", "1"])
    monkeypatch.setattr(search, "START", [])
    command = ["--rows", "default", "--data-dir", str(data_dir), "--output-dir", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(search, "write_csv", killed)
        search.main(command)
    monkeypatch.setattr(pretrain, "_fit", killed)
    for _ in range(2):
        search.main(command)
    assert set(pd.read_csv(tmp_path / "pretraining_search.csv")["row"]) == {"default"}
    assert not list(tmp_path.rglob("*.safetensors"))


def killed(*_: Any) -> None:
    raise RuntimeError("killed")


def _work(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def _run(folder: Path) -> None:
    for _ in range(2):
        FORK.Process(target=_tied, args=(os.getpid(), _work, folder)).start()
    time.sleep(60)


def is_alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    run = FORK.Process(target=_run, args=(tmp_path,))
    run.start()
    wait_until(lambda: len(os.listdir(tmp_path)) == 2)
    workers = os.listdir(tmp_path)
    assert all(map(is_alive, workers))
    run.kill()
    run.join()
    wait_until(lambda: not any(map(is_alive, workers)))


def test_temporary_files_are_removed_while_nobody_writes_one(tmp_path, monkeypatch):
    left = tmp_path / ".scores.csv.1.tmp"
    left.touch()

    def lockf(*_: Any) -> None:
        with open(tmp_path / ".lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with output_folder(tmp_path, alone=True), locked(tmp_path):
        assert not left.exists()


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "scores.csv"
    write_atomic(path, b"old")
    for thread in ("", "-7"):
        left = tmp_path / f".scores.csv.{of_the_past()}{thread}.tmp"
        left.write_bytes(b"of a process that was killed")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["scores.csv"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["scores.csv"]


def of_the_past() -> int | None:
    process = FORK.Process(target=int)
    process.start()
    process.join()
    return process.pid


def test_only_what_the_dead_have_left_of_this_file_is_removed(tmp_path):
    dead = of_the_past()
    others = {f".a.csv.{os.getppid()}-1.tmp", f".a.csv.gz.{dead}-1.tmp", f".a.csv.5.{dead}.tmp"}
    for name in others:
        (tmp_path / name).touch()
    write_atomic(tmp_path / "a.csv", b"content")
    assert set(os.listdir(tmp_path)) == {"a.csv", *others}


def test_a_file_that_could_not_be_put_in_its_place_is_an_error(tmp_path, monkeypatch):
    def remove(descriptor: int) -> None:
        for left in tmp_path.iterdir():
            left.unlink()

    monkeypatch.setattr(os, "fsync", remove)
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "a.csv", b"content")


def test_threads_that_write_at_once_do_not_mix(tmp_path):
    path, contents = tmp_path / "a.csv", [bytes([i]) * 10_000 for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_atomic, [path] * len(contents), contents))
    assert path.read_bytes() in contents and os.listdir(tmp_path) == ["a.csv"]


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
