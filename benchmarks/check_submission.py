"""Check benchmark records by the rules of Matbench's own submission test.

``python benchmarks/check_submission.py benchmarks/matbench_v0.1_PolySRL`` prints one line per
problem and exits with 1, or one line per record and exits with 0. It also takes records of the
suites of this project (``embedded_v0.1``, ``wetlab_v0.1``), which follow the same format.
"""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Any

from files import one_line, printable, read_json
from matbench.bench import MatbenchBenchmark
from matbench.constants import CLF_KEY, CLF_METRICS, MBV01_KEY, REG_METRICS
from matbench.task import MatbenchTask
from matbench.util import hash_dictionary
from submission import INFO_FILE, OWN_BENCHMARKS, RESULTS_FILE, FoldRuleBenchmark
from tasks import EMBEDDED_KEY, EMBEDDED_TARGETS, load_task

from polysrl_dc.errors import InvalidInputError

FILLED_KEYS = ("authors", "algorithm", "algorithm_long", "bibtex_refs", "requirements")
FOLDS = tuple(f"fold_{number}" for number in range(5))
LARGEST_FILE = 10_000_000
"""Bytes that a file other than the results may have."""


def check_records(folders: list[Path]) -> list[str]:
    """Problems of several records; each algorithm name may be used once per benchmark."""
    problems: list[str] = []
    seen: dict[tuple[str, str], Path] = {}
    for folder in folders:
        problems += [printable(f"{folder}: {problem}") for problem in check_record(folder)]
        try:
            name = read_json(folder / INFO_FILE, LARGEST_FILE)["algorithm"]
        except (ValueError, KeyError, TypeError):
            continue
        suite = folder.resolve().parent.name  # of a suite with several records
        benchmark = suite if suite in OWN_BENCHMARKS else folder.name.partition("_PolySRL")[0]
        key = (benchmark, str(name))
        if key in seen:
            problems.append(f"{folder}: {seen[key]} has the same algorithm name {name!r}")
        seen[key] = folder
    return problems


def check_record(folder: Path) -> list[str]:
    """Problems of one record, one line each; empty when Matbench would accept it."""
    if not folder.is_dir():
        return ["no such folder"]
    problems = _info_problems(folder / INFO_FILE)
    if not any(folder.glob("*.py")) and not any(folder.glob("*.ipynb")):
        problems.append("neither a notebook nor a .py file says how the record was made")
    for file in sorted(folder.iterdir()):
        if file.name == ".ipynb_checkpoints":
            problems.append(f"{file.name} must not be submitted")
        elif file.name != RESULTS_FILE and file.lstat().st_size > LARGEST_FILE:
            problems.append(f"{file.name} is larger than 10 MB")
    return problems + _results_problems(folder / RESULTS_FILE)


def _info_problems(path: Path) -> list[str]:
    try:
        info = read_json(path, LARGEST_FILE)
    except InvalidInputError as error:
        return [str(error)]
    if not isinstance(info, dict):
        return [f"{path.name} is not a JSON object"]
    problems = [f"{key!r} is missing or empty" for key in FILLED_KEYS if not info.get(key)]
    problems += [] if "notes" in info else ["'notes' is missing"]
    return [f"{path.name}: {problem}" for problem in problems]


def _results_problems(path: Path) -> list[str]:
    try:
        content = read_json(path)
    except InvalidInputError as error:
        plain = "Not a gzipped file" in str(error)
        hint = "; it is not gzip, Matbench 0.6 writes plain text under this name"
        return [f"{error}{hint if plain else ''}"]
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        return [f"{path.name} is not a benchmark record"]
    if not content["tasks"]:
        return [f"{path.name} holds no task"]
    try:
        problems = _hash_problems(content)
        for name, task in content["tasks"].items():
            problems += [f"{name}: {problem}" for problem in _task_problems(task)]
        return problems or _benchmark_problems(content)
    except Exception as error:  # a record from elsewhere can have any shape; each is a refusal
        return [f"{path.name} is not a benchmark record: {one_line(error)}"]


def _hash_problems(content: dict[str, Any]) -> list[str]:
    rest = {key: value for key, value in content.items() if key != "hash"}
    if hash_dictionary(rest) != content.get("hash"):
        return ["the hash does not fit the content, which was changed after it was written"]
    return []


def _task_problems(task: dict[str, Any]) -> list[str]:
    """Every fold, every key, plain finite floats; what Matbench itself does not look at."""
    problems = []
    results = task.get("results")
    if not isinstance(results, dict):
        return ["holds no results"]
    for fold in FOLDS:
        result = results.get(fold)
        if not isinstance(result, dict) or not result.get("data"):
            problems.append(f"{fold} is not recorded")
            continue
        missing = [key for key in ("data", "parameters", "scores") if key not in result]
        problems += [f"{fold}: {key!r} is missing" for key in missing]
        problems += _number_problems(fold, result)
    problems += [f"{key} is no fold" for key in results if key not in FOLDS]
    return problems


def _number_problems(fold: str, result: dict[str, Any]) -> list[str]:
    groups = {"prediction": result["data"], "score": result.get("scores", {})}
    uncertainty = result.get("uncertainty")
    if uncertainty is not None:
        if set(uncertainty) != set(result["data"]):
            return [f"{fold}: the uncertainties are not of the samples that were predicted"]
        for key in ("std", "ci_lower", "ci_upper"):
            groups[key] = {sample: entry.get(key) for sample, entry in uncertainty.items()}
    problems = []
    for kind, values in groups.items():
        bad = [
            (name, value)
            for name, value in values.items()
            if not (isinstance(value, float) and math.isfinite(value))
        ]
        if bad and not (kind == "prediction" and all(isinstance(v, bool) for _, v in bad)):
            name, value = bad[0]
            problems.append(f"{fold}: the {kind} of {name} is {value!r}, not a finite float")
    return problems


def _benchmark_problems(content: dict[str, Any]) -> list[str]:
    """What Matbench says when it reads the record, then what its tasks' validation says."""
    name = content.get("benchmark_name")
    if name != MBV01_KEY and name not in OWN_BENCHMARKS:
        return [f"the benchmark {name!r} is none of {MBV01_KEY}, {', '.join(OWN_BENCHMARKS)}"]
    kind = MatbenchBenchmark if name == MBV01_KEY else FoldRuleBenchmark
    try:
        benchmark = kind.from_dict(dict(content))
    except Exception as error:  # Matbench raises many kinds; each is a refusal
        return [f"Matbench refuses it: {one_line(error)}"]
    if not benchmark.is_valid:
        return [f"{task}: {text.splitlines()[-1]}" for task, text in benchmark.validate().items()]
    problems = []
    for task in benchmark.tasks:
        problems += _score_problems(task)
        if name == EMBEDDED_KEY:
            problems += _embedded_problems(task)
    return problems


def _score_problems(task: MatbenchTask) -> list[str]:
    metrics = CLF_METRICS if task.metadata.task_type == CLF_KEY else REG_METRICS
    return [
        f"{task.dataset_name}: {fold} has the scores {sorted(scores)} instead of {sorted(metrics)}"
        for fold in task.folds_keys
        if set(scores := task.results[fold]["scores"]) != set(metrics)
    ]


def _embedded_problems(task: MatbenchTask) -> list[str]:
    if task.dataset_name not in EMBEDDED_TARGETS:
        return [f"{task.dataset_name} is no task of {EMBEDDED_KEY}"]
    own = load_task(task.dataset_name).metadata
    return [
        f"{task.dataset_name}: {key} is {task.metadata[key]!r} instead of {own[key]!r}"
        for key in ("n_samples", "target", "unit", "task_type")
        if task.metadata[key] != own[key]
    ]


def main(argv: list[str] | None = None) -> int:
    """Check the folders named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="record folders")
    folders = parser.parse_args(argv).folders
    logging.getLogger("matbench").setLevel(logging.CRITICAL + 1)
    problems = check_records(folders)
    for problem in problems:
        print(problem)
    if not problems:
        for folder in folders:
            print(f"{folder}: accepted by the rules of Matbench's submission test")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
