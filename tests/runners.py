"""Small jobs of every runner, what a finished one leaves, and what it must not train again.

:func:`prepare` imports the runners and cuts their jobs down; each job is then a function of its
output folder, and notes every fold, target or model that it begins to train.
"""

import functools
import gzip
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from processes import PRETRAIN, crystals

N_ROWS, SEEDS = 40, 2
#: Columns and metrics of tables that are measured, not computed.
MEASURED = ["seconds", "structures_per_second", "peak_memory_mib"]
LOCKS, TEMPORARY = (".lock", ".running"), "temporary"
#: Where a process notes what it begins to train; a file descriptor.
NOTES = -1
loaded = SimpleNamespace()


# ------------------------------------------------------------------------------------ the jobs


def matbench(folder: Path, *more: str) -> Any:
    job = ["--tasks", "jdft2d", "--epochs", "1", "--ensemble", "1", "--device", "cpu"]
    return loaded.run_matbench.main([*job, "--output-dir", str(folder), *more])


def embedded(folder: Path, *more: str) -> Any:
    job = ["--suite", "embedded", "--epochs", "1", "--ensemble", "1", "--device", "cpu"]
    return loaded.run_matbench.main([*job, "--output-dir", str(folder), *more])


def paper(folder: Path, *more: str) -> Any:
    job = ["--models", *(more or ["rand_init", "magpie_ridge"]), "--folds", "grouped"]
    job += ["--seeds", str(SEEDS), "--protocols", "representation", "--output-dir", str(folder)]
    return loaded.run_matbench.main(["--paper", *job])


def wetlab(folder: Path, *more: str) -> Any:
    job = ["--models", "rand_init", "--seeds", str(SEEDS), "--output-dir", str(folder)]
    return loaded.run_wetlab.main([*job, *more])


def by_recipe(folder: Path) -> Any:
    job = ["--recipes", "single, random start", "--targets", "metallic"]
    return loaded.recipes.main([*job, "--output-dir", str(folder)])


def calibrating(folder: Path) -> Any:
    return loaded.calibration.main(["--targets", "metallic", "--output-dir", str(folder)])


def with_encoder(seed: int) -> Callable[[Path], Any]:
    """The representation protocol with one of two encoders that have the same name."""

    def job(folder: Path) -> Any:
        return wetlab(
            folder,
            *("--encoder", str(loaded.encoders[seed]), "--name", "mine"),
            *("--protocols", "representation", "--folds", "grouped"),
        )

    return job


def pretraining(folder: Path) -> Any:
    return loaded.pretrain.main([*PRETRAIN, "--output-dir", str(folder)])


def searching(folder: Path) -> Any:
    return loaded.search.main(["--output-dir", str(folder)])


def packing(folder: Path) -> Any:
    loaded.packing.pack(loaded.structures, folder, processes=1, progress=False)


def training(folder: Path) -> Any:
    job = ["train", "--input", str(loaded.table), "--target", "value", "--pretrained", "none"]
    return loaded.cli.main([*job, "--epochs", "2", "--output-dir", str(folder)])


# ---------------------------------------------------------------------------- what is finished


def unit(*parts: Any) -> str:
    """Name of what is trained at once and kept."""
    return ", ".join(map(str, parts))


def folds(folder: Path) -> set[str]:
    records = [json.loads(path.read_bytes()) for path in folder.glob("folds/*/*/fold_*.json")]
    return {unit(r["task"], r["settings"]["seed"], r["fold"]) for r in records}


def targets(folder: Path) -> set[str]:
    """Folds of transfer, and targets whose heads are in the record and in the table of scores."""
    done = folds(folder)
    for path in folder.glob("*_scores.csv"):
        table = pd.read_csv(path).query("protocol == 'representation'")
        for run, rows in table.groupby(["model", "suite", "task"]):
            if len(rows) == SEEDS * 5 * 2:
                done.add(unit(*run))
    return done


def models(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.rglob("model.safetensors")}


def rows_of_the_search(folder: Path) -> set[str]:
    table = folder / "pretraining_search.csv"
    rows = pd.read_csv(table)["row"] if table.exists() else ()
    return {name.replace(" ", "_") for name in rows} | models(folder)


def parts(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*.parts/0*/manifest.json")}


def nothing(folder: Path) -> set[str]:
    return set()


@dataclass(frozen=True)
class Runner:
    """What is run.

    Attributes
    ----------
    job : callable
        Runs in a folder.
    finished : callable
        What of the job a folder holds already.
    before, beside : callable
        A job that the folder has seen before, and another one that runs at the same time.
    alone : bool
        Refuses to run twice at once.
    command : bool
        Errors of the disk end it with one line.
    """

    job: Callable[[Path], Any]
    finished: Callable[[Path], set[str]]
    before: Callable[[Path], Any] | None = None
    beside: Callable[[Path], Any] | None = None
    alone: bool = False
    command: bool = True


RUNNERS = {
    "run_matbench.py": Runner(
        matbench, folds, beside=lambda folder: embedded(folder, "--tasks", "embedded_seebeck")
    ),
    "run_matbench.py --suite embedded": Runner(
        embedded, folds, beside=lambda folder: embedded(folder, "--protocol", "frozen")
    ),
    "run_matbench.py --paper": Runner(
        paper, targets, beside=lambda folder: paper(folder, "magpie_ridge")
    ),
    "run_wetlab.py": Runner(wetlab, targets, beside=with_encoder(0)),
    "run_wetlab.py after another encoder": Runner(with_encoder(1), nothing, with_encoder(0)),
    "recipes.py": Runner(by_recipe, folds),
    "calibration.py": Runner(calibrating, folds),
    "pretrain.py": Runner(pretraining, models, alone=True),
    "search.py": Runner(searching, rows_of_the_search, alone=True),
    "packing": Runner(packing, parts, command=False),
    "polysrl train": Runner(training, nothing),
}


# ---------------------------------------------------------------------------- what is started


def noting(function: Callable, units_of: Callable[..., Iterable[str]]) -> Callable:
    """The function, which notes what it begins."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        os.write(NOTES, "".join(f"{name}\n" for name in units_of(*args)).encode())
        return function(*args, **kwargs)

    return wrapped


def prepare(scratch: Path) -> None:
    """Import the runners, make their jobs small, and let them note what they begin."""
    import calibration
    import pretrain
    import recipes
    import run_matbench
    import run_wetlab
    import search
    import torch
    from crystals import PROTOTYPES
    from models import FORMULAS, SIGNAL

    from polysrl_dc import PolySRLModel, cli, packing, sources

    torch.set_num_threads(1)
    loaded.run_matbench, loaded.run_wetlab, loaded.pretrain = run_matbench, run_wetlab, pretrain
    loaded.search, loaded.packing, loaded.cli = search, packing, cli
    loaded.recipes, loaded.calibration = recipes, calibration
    _cut_tasks()
    _cut_targets()
    search.BUDGET, search.START = PRETRAIN, []
    search.ROWS = {"default": [], "1 epoch": ["--epochs", "1"]}
    pretrain._fit = noting(pretrain._fit, lambda model, *_: [Path(model.model_dir).name])
    crystals()  # packs them for all
    sources._SMALL_PART = 12
    packing._write_part = noting(packing._write_part, lambda arguments: [arguments[1].name])
    loaded.structures = PROTOTYPES
    loaded.table = scratch / "table.csv"
    pd.DataFrame({"formula": FORMULAS, "value": SIGNAL}).to_csv(loaded.table, index=False)
    loaded.encoders = [scratch / f"encoder{seed}" for seed in range(2)]
    for seed, folder in enumerate(loaded.encoders):
        PolySRLModel(pretrained=None, seed=seed).save(folder)


def _cut_tasks() -> None:
    import run_matbench
    import tasks

    table = tasks.embedded_table()[0].iloc[:N_ROWS]
    counts = {"rows": 47737, "unusable": 0, "formulas": 34631, "kept": N_ROWS}
    tasks.embedded_table = lambda: (table, counts)
    run_matbench.task_inputs = noting(
        run_matbench.task_inputs, lambda task, fold: [unit(task.dataset_name, 0, fold)]
    )


def _cut_targets() -> None:
    import calibration
    import paper_protocol
    import recipes
    import run_matbench
    import run_wetlab
    import search
    import targets
    import tasks
    import transfer

    data = tasks.find_data_dir()
    small = {
        t.name: targets.Target(
            *(t.name, t.unit, t.formulas[:N_ROWS], t.values[:N_ROWS], t.scale, t.batch_size),
            suite=t.suite,
            held_back=t.held_back,
        )
        for t in (*targets.wetlab_targets(data), targets.matbench_target("matbench_jdft2d", data))
    }
    run_matbench.matbench_targets = lambda _: [small["matbench_jdft2d"]]
    run_wetlab.wetlab_targets = lambda _: [small["metallic"], small["estm600_seebeck"]]
    search.wetlab_targets = recipes.wetlab_targets = run_wetlab.wetlab_targets
    calibration.all_targets = run_wetlab.wetlab_targets
    calibration.EPOCHS = (1,)
    cut = {"ensemble": 1, "inner_folds": 2}
    calibration.Settings = functools.partial(calibration.Settings, **cut)
    recipes.RECIPES = {name: replace(one, epochs=1) for name, one in recipes.RECIPES.items()}
    calibration.cross_predict = noting(
        calibration.cross_predict,
        lambda target, train, test, settings: [
            unit(f"calibration_{target.name}", settings.seed, fold)
            for fold, (_, rows) in enumerate(target.splits())
            if np.array_equal(rows, test)
        ],
    )
    search.predict_targets = functools.partial(search.predict_targets, epochs=1)
    paper_protocol.EPOCHS = 2
    transfer.EPOCHS, transfer.LEARNING_RATES = 1, (1e-3,)
    transfer.predict_fold = functools.partial(transfer.predict_fold, epochs=1)
    paper_protocol._train_fold = noting(
        paper_protocol._train_fold,
        lambda fold, unfinished, predict, target, split, model, seed, *_: [
            unit(target.task.dataset_name, seed, fold)
        ],
    )
    names = {splits_of: name for name, splits_of in paper_protocol.FOLDS.items()}
    paper_protocol.predict_targets = noting(
        paper_protocol.predict_targets,
        lambda embed, group, seeds, splits_of, *_: [
            unit("rand_init", paper_protocol.suite_name(t.suite, names[splits_of]), t.name)
            for t in group
        ],
    )


# ------------------------------------------------------------------------------ what is left


def content(folder: Path) -> dict[str, Any]:
    """By name of the file, everything that a run has computed, in a form that can be compared."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = [path for path in files if path.name not in LOCKS and "tensorboard" not in path.parts]
    return {str(path): _read(folder / path, path) for path in kept}


def _read(file: Path, path: Path) -> Any:
    from polysrl_dc.checkpoints import load_checkpoint

    if any(part.startswith(".") or part.endswith(".parts") for part in path.parts):
        return TEMPORARY
    if path.suffix == ".safetensors":
        tensors, manifest = load_checkpoint(file)
        return manifest, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    if path.name.endswith(".json.gz"):
        record = json.loads(gzip.decompress(file.read_bytes()))  # its date, and hash, aside
        return {name: record[name] for name in ("benchmark_name", "tasks", "user_metadata")}
    if path.suffix == ".json":
        return json.loads(file.read_bytes())
    if path.suffix == ".csv":
        table = pd.read_csv(file, dtype=str).drop(columns=MEASURED, errors="ignore")
        if "metric" in table:
            table = table[~table["metric"].isin(MEASURED)]
        return table.to_csv(index=False)
    return file.read_bytes()


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the files that only one of two runs has left, or that differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
