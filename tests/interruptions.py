"""The runners, killed at random moments, two at once, and without a place to write to.

Run as a program it imports deepchem once and forks a process for every run, before PyTorch has
threads or a GPU. Tests call :func:`outcome`, which runs it once.
"""

import atexit
import contextlib
import errno
import functools
import json
import mmap
import multiprocessing
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import runners
from runners import RUNNERS, Runner, content, differences

SEED = 2023
#: Least number of kills of each runner, in a run of all tests and with ``--deep``.
KILLS = {False: 1, True: 25}
#: Runners that are tried at the same time.
PROCESSES = 2
#: A run that takes longer is taken for stuck, in seconds.
PATIENCE = 300
CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


# ----------------------------------------------------------------------------------- one run


@dataclass
class Disturbance:
    """What happens to a run.

    Attributes
    ----------
    at : int
        Killed when it is about to change its folder for this time: to open a file for writing, to
        rename, make or remove one; 0 for never.
    cut : bool
        The file that it would have opened then is opened, and empty.
    after : float
        Killed after so many seconds.
    pause : float
        Waits up to so many seconds before each change, by chance.
    meets : Barrier, optional
        Waits before its first change until the other run has come to it as well.
    largest : int
        Size in bytes beyond which no file grows: a full disk.
    read_only : bool
        Every change of the folder is refused, as by a disk that is mounted so.
    """

    at: int = 0
    cut: bool = False
    after: float = PATIENCE
    pause: float = 0.0
    meets: Barrier | None = None
    largest: int | None = None
    read_only: bool = False


class Run:
    """A process that runs a job in a folder.

    Attributes
    ----------
    status : int
        0, or of the exit, or the signal's negative.
    stderr : str
    begun : list of str
        What it began to train.
    changes : int
        How often it was about to change its folder.
    seconds : float
    """

    def __init__(self, job: Callable[[Path], Any], folder: Path, what: Disturbance) -> None:
        self._what, self._started = what, time.monotonic()
        self._changes = mmap.mmap(-1, 8)
        pipes = [os.pipe() for _ in range(2)]
        self._pid = os.fork()
        if not self._pid:
            os.dup2(pipes[0][1], 2)
            runners.NOTES = pipes[1][1]
            _child(job, folder, what, self._changes)
        for _, end in pipes:
            os.close(end)
        self._ends = [end for end, _ in pipes]

    def wait(self) -> "Run":
        """Let it end, or kill it."""
        errors, process = self._ends[0], os.pidfd_open(self._pid)
        read = [b"", b""]
        while process not in (ready := self._ready(process, errors)):
            if not ready:
                os.kill(self._pid, signal.SIGKILL)
            if errors in ready:
                read[0] += os.read(errors, 65536)
        self.seconds = time.monotonic() - self._started
        self.status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        for i, end in enumerate(self._ends):
            os.set_blocking(end, False)
            try:
                while part := os.read(end, 65536):
                    read[i] += part
            except BlockingIOError:  # a worker of the process holds the other end
                pass
            os.close(end)
        os.close(process)
        self.stderr, notes = (part.decode(errors="replace") for part in read)
        self.begun = notes.splitlines()
        self.changes = int.from_bytes(self._changes[:8], "little")
        return self

    def _ready(self, *files: int) -> list[int]:
        left = self._started + self._what.after - time.monotonic()
        return select.select(files, [], [], max(left, 0.0))[0]


def _child(
    job: Callable[[Path], Any], folder: Path, what: Disturbance, changes: mmap.mmap
) -> None:
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if what.largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (what.largest, what.largest))
        sys.addaudithook(_watch(folder, what, changes))
        result = job(folder)
        status = result if isinstance(result, int) else 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _watch(folder: Path, what: Disturbance, changes: mmap.mmap) -> Callable[[str, tuple], None]:
    """Count what the process is about to change below a folder."""
    root, process = str(folder), os.getpid()
    rng = np.random.default_rng(process)
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in CHANGES or not str(arguments[0]).startswith(root):
            return
        writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes or os.getpid() != process:
            return
        count += 1
        changes[:8] = count.to_bytes(8, "little")
        if count == what.at:
            if what.cut and event == "open" and Path(arguments[0]).parent.is_dir():
                os.open(arguments[0], arguments[2])
            os.kill(process, signal.SIGKILL)
        if what.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))
        if count == 1 and what.meets is not None:
            what.meets.wait(PATIENCE)
        if what.pause:
            time.sleep(rng.uniform(0, what.pause))

    return watch


def run(job: Callable[[Path], Any], folder: Path, **disturbance: Any) -> Run:
    return Run(job, folder, Disturbance(**disturbance)).wait()


# ---------------------------------------------------------------------------- what is tried


def is_left(path: str, files: Collection[str]) -> bool:
    """Whether a killed run has left a file that the next may remove, as nothing needs it.

    Such are temporary files, and what was trained of a fold that is finished.
    """
    if fold := re.match("unfinished/(.+)_fold([0-9]+)/", path):
        return f"folds/{fold[1]}/fold_{fold[2]}.json" in files
    return path.endswith(".tmp")


@dataclass
class Found:
    """What became of one runner.

    Attributes
    ----------
    kills : int
    lost : list of str
        What had been finished before a kill and was trained again.
    differ : list of str
        Files that are not those of a run that nothing has disturbed.
    at_once : dict
        By what ran beside the job: exit statuses, messages, files that differ.
    refused : dict
        By the state of the disk: exit status, messages, what was trained, files that differ.
    error : str
        Of the trial itself.
    """

    kills: int = 0
    lost: list[str] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)
    at_once: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class Trial:
    """Everything that happens to one runner, in folders of its own."""

    def __init__(self, runner: Runner, scratch: Path) -> None:
        self.runner, self.scratch, self.found = runner, scratch, Found()
        self.rng = np.random.default_rng(SEED)
        self.whole = self._succeed(runner.job, self.folder("undisturbed"))
        self.expected = content(self.folder("undisturbed"))

    def folder(self, name: str) -> Path:
        """A folder, which is new at the first call, but for what the job finds there."""
        folder = self.scratch / name
        if not folder.exists():
            folder.mkdir(parents=True)
            if self.runner.before is not None:
                self._succeed(self.runner.before, folder)
        return folder

    def _succeed(self, job: Callable[[Path], Any], folder: Path) -> Run:
        ended = run(job, folder)
        assert ended.status == 0, f"status {ended.status}: {ended.stderr}"
        return ended

    def kill(self, often: int) -> None:
        """Kill the job at random moments and start it again until it ends; and all that again."""
        found, rng = self.found, self.rng
        while found.kills < often:
            folder = self.folder(f"killed{found.kills}")
            finished: set[str] = set()
            for again in range(5):
                finished |= self.runner.finished(folder)
                moment = {"after": rng.uniform(0, self.whole.seconds)}
                if rng.random() < 0.75:
                    change = int(rng.integers(1, self.whole.changes + 1))
                    moment = {"at": change, "cut": rng.random() < 0.5}
                ended = run(self.runner.job, folder, **(moment if again < 4 else {}))
                found.lost += sorted(finished & set(ended.begun))
                finished |= set(ended.begun[:-1])  # all but the one that ran
                if ended.status != -signal.SIGKILL:
                    break
                found.kills += 1
            assert ended.status == 0, f"status {ended.status} after kills: {ended.stderr}"
            found.differ += [f"{folder.name}/{path}" for path in self._differences(folder)]

    def at_once(self) -> None:
        """Run the job twice at once, and beside another one."""
        for name, other in (("itself", self.runner.job), ("another", self.runner.beside)):
            if other is None:
                continue
            folder, expected = self.folder(f"beside {name}"), self.expected
            what = Disturbance(pause=0.02, meets=multiprocessing.Barrier(2))
            both = [Run(job, folder, what) for job in (self.runner.job, other)]
            ended = [run.wait() for run in both]
            if name == "another":
                after = self.scratch / "one after another"
                shutil.copytree(self.folder("undisturbed"), after)
                self._succeed(other, after)
                expected = content(after)
            self.found.at_once[name] = {
                "status": sorted(run.status for run in ended),
                "stderr": "".join(run.stderr for run in ended),
                "differ": differences(content(folder), expected),
            }

    def refuse(self) -> None:
        """Let the job find no place to write to, at once or after a part of it is finished."""
        part = self.folder("part")
        run(self.runner.job, part, at=self.whole.changes // 2)
        for name, folder, disturbance in (
            ("no folder", Path(os.devnull, "out"), {}),
            ("read-only", self.folder("read-only"), {"read_only": True}),
            ("full", part, {"largest": 100}),
        ):
            found = content(part)
            before = {k: v for k, v in found.items() if not is_left(k, found)}
            ended = run(self.runner.job, folder, **disturbance)
            self.found.refused[name] = {
                "status": ended.status,
                "stderr": ended.stderr,
                "folder": str(folder),
                "begun": ended.begun,
                "differ": differences({**before, **content(part)}, content(part)),
            }
        finished = self.runner.finished(part)
        ended = self._succeed(self.runner.job, part)
        self.found.lost += sorted(finished & set(ended.begun))
        self.found.differ += [f"part/{path}" for path in self._differences(part)]

    def _differences(self, folder: Path) -> list[str]:
        """Files of a folder that are not those of a run that nothing has disturbed."""
        return differences(content(folder), self.expected)


def _try(name: str, scratch: Path, kills: int) -> None:
    """Put a runner to all trials and write down what was found."""
    start, found = time.monotonic(), Found()
    try:
        trial = Trial(RUNNERS[name], scratch / name.replace(" ", "_"))
        found = trial.found
        trial.kill(kills)
        trial.at_once()
        trial.refuse()
    except Exception:
        found.error = traceback.format_exc()
    (scratch / f"{name}.json").write_text(json.dumps(asdict(found)))
    print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    os._exit(0)


def _main(scratch: Path, kills: int, names: list[str]) -> None:
    runners.prepare(scratch)
    for i, name in enumerate(names or RUNNERS):
        if i >= PROCESSES:
            os.wait()
        if not os.fork():
            _try(name, scratch, kills)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


@functools.cache
def outcome(deep: bool, data_dir: Path) -> dict[str, Found]:
    """What became of every runner, by its name."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), str(root / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "POLYSRL_DATA": str(data_dir),
        "TQDM_DISABLE": "1",
    }
    ended = subprocess.run(
        [sys.executable, __file__, folder, str(KILLS[deep])],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {name: Found(**json.loads((folder / f"{name}.json").read_text())) for name in RUNNERS}


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
