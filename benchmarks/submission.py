"""Benchmark records in Matbench's submission format.

A record is a folder with ``results.json.gz``, ``info.json`` and a script that repeats it.
It holds the tasks all of whose folds are recorded. Running further tasks later adds them to the
same record; running a task again with other settings replaces it.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from files import one_line, read_json
from folds import locked
from matbench.bench import MatbenchBenchmark
from matbench.constants import MBV01_KEY, REG_KEY
from matbench.task import MatbenchTask
from matbench.util import RecursiveDotDict
from tasks import FOLD_RULE_KEYS, FoldRuleTask

from polysrl_dc.checkpoints import write_atomic
from polysrl_dc.errors import InvalidInputError

RESULTS_FILE, INFO_FILE = "results.json.gz", "info.json"
OWN_BENCHMARKS = tuple(FOLD_RULE_KEYS.values())
REQUIREMENTS = ("torch", "deepchem", "matbench", "matminer", "pymatgen", "scikit-learn")
#: What ``info.json`` says of the encoder, by protocol; the last: one or the other.
BY_TASK = "by task"
TRAINED = {
    "frozen": "The encoder is frozen.",
    "finetune": "Encoder and head are trained together.",
    BY_TASK: "The encoder is frozen on some tasks; on the others it is trained with the head.",
}
#: What ``info.json`` says of the settings of ``run_matbench.py``.
CHOSEN = (
    "Predictions are the mean of the ensemble. Of several learning rates and epochs in "
    "user_metadata one is chosen on a part of each training fold, and so is the scale of the "
    "uncertainties; the other settings are fixed, and were found on parts of some of these tasks."
)


class FoldRuleBenchmark(MatbenchBenchmark):
    """A benchmark of :class:`tasks.FoldRuleTask`, read and written like Matbench's own.

    ``user_metadata["tasks"]`` holds each task's metadata, from which its ids and folds follow.
    """

    def __init__(self, benchmark: str, task_metadata: dict[str, dict[str, Any]]) -> None:
        if benchmark not in OWN_BENCHMARKS:
            raise ValueError(f"benchmark {benchmark!r} is none of {', '.join(OWN_BENCHMARKS)}")
        self.benchmark_name = benchmark
        self.metadata = RecursiveDotDict(task_metadata)
        self.user_metadata: dict[str, Any] = {}
        self.tasks_map = RecursiveDotDict()

    @classmethod
    def _from_args(
        cls, benchmark_name: str, tasks_dict: dict[str, Any], user_metadata: dict[str, Any]
    ) -> FoldRuleBenchmark:
        described = user_metadata.get("tasks", {})
        missing = sorted(set(tasks_dict) - set(described))
        if missing:
            raise ValueError(f"user_metadata does not describe the tasks {', '.join(missing)}")
        for name, content in tasks_dict.items():  # before as many ids are made as it claims
            recorded = sum(len(fold["data"]) for fold in content["results"].values())
            if described[name]["n_samples"] > recorded:
                raise ValueError(
                    f"{name}: {described[name]['n_samples']} samples, {recorded} predictions; "
                    "required indices are missing"
                )
        benchmark = cls(benchmark_name, described)
        for name, content in tasks_dict.items():
            task = FoldRuleTask(name, benchmark_name, described[name])
            task.results = RecursiveDotDict(content["results"])
            task.validate()
            benchmark.tasks_map[name] = task
        benchmark.user_metadata = user_metadata
        return benchmark


def record_fold(
    task: MatbenchTask,
    fold: int,
    predictions: Sequence[float] | np.ndarray,
    std: Sequence[float] | np.ndarray | None = None,
    params: dict[str, Any] | None = None,
) -> None:
    """Record a fold with native floats, and refuse what Matbench would record and then reject.

    Parameters
    ----------
    task : matbench.task.MatbenchTask
        Task with its data.
    fold : int
        Number of the fold.
    predictions : (n,)
        Label units, or the probability of class 1 in [0, 1] for classification.
    std : (n,), optional
        Standard deviations in label units, for regression only.
    params : dict, optional
        What the model chose for this fold.

    Raises
    ------
    ValueError
        On a wrong number of values, NaN or infinity, a probability outside [0, 1], or a standard
        deviation that is not positive; nothing is recorded then.
    """
    where = f"{task.dataset_name} fold {fold}"
    n_test = len(task.validation[task.folds_map[fold]].test)
    values = native_floats(predictions, n_test, f"{where}: predictions")
    if task.metadata.task_type != REG_KEY:
        if std is not None:
            raise ValueError(f"{where}: Matbench takes standard deviations for regression only")
        outside = [value for value in values if not 0.0 <= value <= 1.0]
        if outside:
            raise ValueError(f"{where}: {outside[0]} is not a probability in [0, 1]")
    spread = None if std is None else native_floats(std, n_test, f"{where}: std")
    if spread is not None and min(spread) <= 0.0:
        raise ValueError(f"{where}: a standard deviation of {min(spread)} is not positive")
    task.record(fold, values, params=params or {}, std=spread)


def recorded_fold(
    task: MatbenchTask, fold: int
) -> tuple[list[str], list[float], list[float] | None, dict[str, Any]]:
    """Ids, predictions, standard deviations and parameters of a recorded fold, as native values."""
    result = task.results[task.folds_map[fold]]
    spread = result["uncertainty"]
    std = None if spread is None else [spread[sample]["std"] for sample in result["data"]]
    return list(result["data"]), list(result["data"].values()), std, result["parameters"]


def native_floats(values: Sequence[float] | np.ndarray, length: int, what: str) -> list[float]:
    """The values as finite Python floats; a ``ValueError`` names what is wrong."""
    floats = [float(value) for value in np.asarray(values, dtype=float).reshape(-1)]
    if len(floats) != length:
        raise ValueError(f"{what}: {len(floats)} values for {length} samples")
    bad = [index for index, value in enumerate(floats) if not np.isfinite(value)]
    if bad:
        raise ValueError(f"{what}: value {floats[bad[0]]} at position {bad[0]} is not finite")
    return floats


def record_folder(output_dir: Path, benchmark: str, protocol: str) -> Path:
    """Where a record goes; the fine-tuned one has the plain name ``<benchmark>_PolySRL``."""
    suffix = "" if protocol == "finetune" else f"_{protocol}"
    return Path(output_dir) / f"{benchmark}_PolySRL{suffix}"


def run_file(folder: Path) -> Path:
    """The script that repeats a record; named after it, so that two records do not clash."""
    return Path(folder) / f"run_{re.sub('[^A-Za-z0-9]', '_', Path(folder).name)}.py"


def read_benchmark(folder: Path) -> MatbenchBenchmark:
    """Read a record by Matbench's own rules: keys, hash, folds, ids, types.

    Raises
    ------
    InvalidInputError
        The record is damaged, or Matbench says what is wrong with it.
    """
    path = Path(folder) / RESULTS_FILE
    content = read_json(path)
    try:
        own = content["benchmark_name"] in OWN_BENCHMARKS
        return (FoldRuleBenchmark if own else MatbenchBenchmark).from_dict(content)
    except Exception as error:  # Matbench raises many kinds; each is a refusal
        raise InvalidInputError(f"{path}: {one_line(error)}") from error


def write_record(
    folder: Path,
    tasks: Sequence[MatbenchTask],
    descriptions: dict[str, dict[str, Any]],
    protocol: str,
    notes: str = "",
    variant: str = "",
    runner: str = "run_matbench.py",
    about: dict[str, Any] | None = None,
    chosen: str = CHOSEN,
) -> Path | None:
    """Merge the fully recorded tasks into a record; several processes may do so at once.

    Parameters
    ----------
    folder : path
        The record's folder, see :func:`record_folder`.
    tasks : sequence of MatbenchTask
        Tasks of one benchmark; those with an unrecorded fold are left out.
    descriptions : dict
        For each task what made it: ``arguments`` (of the runner), settings, seed.
    protocol : str
        ``frozen`` (the paper: representation) or ``finetune`` (transfer), unless the tasks of the
        record differ in their setting ``freeze_encoder``.
    notes, variant : str
        Go into ``info.json``; the variant names one of several records of this project.
    runner : str
        Script that makes such records.
    about : dict, optional
        Of a model that is not ours: what stands in ``info.json`` instead, ``algorithm`` first.
    chosen : str
        Of ours: how the settings were found.

    Returns
    -------
    path or None
        The results file, or ``None`` when no task is complete.
    """
    complete = {task.dataset_name: task for task in tasks if task.all_folds_recorded}
    if not complete:
        return None
    described = {
        name: {**_plain_metadata(task), **descriptions.get(name, {})}
        for name, task in complete.items()
    }
    name = next(iter(complete.values())).benchmark_name
    path = Path(folder) / RESULTS_FILE
    with locked(Path(folder).parent):
        if path.exists():
            earlier = read_benchmark(folder)
            complete = {**earlier.tasks_map, **complete}
            described = {**earlier.user_metadata.get("tasks", {}), **described}
        if len({entry.get("freeze_encoder") for entry in described.values()}) > 1:
            protocol = BY_TASK
        benchmark = _benchmark(name, complete, described)
        content = json.dumps(benchmark.as_dict(), allow_nan=False).encode()
        write_atomic(path, gzip.compress(content, mtime=0))
        info = submission_info(protocol, notes, variant, about, chosen)
        write_atomic(Path(folder) / INFO_FILE, f"{json.dumps(info, indent=2)}\n".encode())
        write_atomic(run_file(folder), _run_script(described, runner).encode())
    return path


def _benchmark(
    name: str, tasks: dict[str, MatbenchTask], described: dict[str, dict[str, Any]]
) -> MatbenchBenchmark:
    ordered = {key: tasks[key] for key in sorted(tasks)}
    benchmark = (
        MatbenchBenchmark(name, subset=list(ordered))
        if name == MBV01_KEY
        else FoldRuleBenchmark(name, described)
    )
    for task in ordered.values():
        _drop_validation_marks(task)
    benchmark.tasks_map = RecursiveDotDict(ordered)
    benchmark.add_metadata({"tasks": json.loads(json.dumps(described))})
    return benchmark


def _drop_validation_marks(task: MatbenchTask) -> None:
    """Remove the empty ``std`` and ``ci`` entries that Matbench's validation leaves behind.

    Its look-up of both in a dict of ids creates them; they are no ids and must not be written.
    """
    for result in task.results.values():
        for mark in ("std", "ci"):
            if result.get("uncertainty") and not result["uncertainty"].get(mark, True):
                del result["uncertainty"][mark]


def _plain_metadata(task: MatbenchTask) -> dict[str, Any]:
    keys = ("input_type", "target", "task_type", "unit", "mad", "n_samples")
    return {key: task.metadata[key] for key in keys}


def submission_info(
    protocol: str, notes: str, variant: str, about: dict[str, Any] | None, chosen: str
) -> dict[str, Any]:
    """The content of ``info.json`` with every key that Matbench asks for."""
    marks = ", ".join(filter(None, ["frozen encoder" if protocol == "frozen" else "", variant]))
    name = about["algorithm"] if about else "PolySRL-DC"
    info = {
        "authors": "PolySRL-DC developers",
        "algorithm": f"{name} ({marks})" if marks else name,
        "algorithm_long": (
            "PolySRL in DeepChem: a graph network over the elements of a formula, which represents "
            "a stoichiometry by a Gaussian, and a small regression or classification head. Only "
            f"compositions enter. {TRAINED[protocol]} {chosen} The settings of each task, and "
            "the encoder it starts from, stand in user_metadata."
        ),
        "bibtex_refs": [
            "@misc{polysrl, title={Stoichiometry Representation Learning with Polymorphic Crystal "
            "Structures}, author={Lee, Namkyeong and Noh, Heewoong and Na, Gyoung S. and Fu, "
            "Tianfan and Sun, Jimeng and Park, Chanyoung}, year={2023}, eprint={2312.13289}, "
            "archivePrefix={arXiv}}"
        ],
        "notes": notes,
        "requirements": {"python": [f"{package}=={_version(package)}" for package in REQUIREMENTS]},
    }
    return {**info, **(about or {}), "algorithm": info["algorithm"]}


def _version(package: str) -> str:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "unknown"


def _run_script(described: dict[str, dict[str, Any]], runner: str) -> str:
    """A script that repeats the runs of a record from the project's root."""
    runs = sorted({shlex.join(entry.get("arguments", ())) for entry in described.values()} - {""})
    listed = "".join(
        "\n".join(f"    {json.dumps(line)}" for line in _wrapped(run)) + ",\n" for run in runs
    )
    return (
        '"""Repeat the runs of this record; start it in the root of the project."""\n\n'
        "import shlex\nimport subprocess\nimport sys\n\n"
        f"RUNS: list[str] = [\n{listed}]\n\n"
        "for run in RUNS:\n"
        f'    command = shlex.split(f"benchmarks/{runner} {{run}}")\n'
        "    subprocess.run([sys.executable, *command], check=True)\n"
    )


def _wrapped(text: str) -> list[str]:
    """The words of a text in short pieces, each but the last ending with a space."""
    pieces = textwrap.wrap(text, 80, break_long_words=False, break_on_hyphens=False)
    return [*(f"{piece} " for piece in pieces[:-1]), pieces[-1]]
