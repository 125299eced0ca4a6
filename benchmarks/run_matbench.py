"""Run PolySRL on the official folds of Matbench, or on the embedded suite that needs no data.

``python benchmarks/run_matbench.py --tasks jdft2d dielectric`` writes
``<output-dir>/matbench_v0.1_PolySRL/`` (the submission), ``<output-dir>/scores.csv`` (all scores),
and ``<output-dir>/folds/`` (finished folds). An interrupted run goes on from these and, where it
stood within a fold, from ``<output-dir>/unfinished/``.

``python benchmarks/run_matbench.py --paper`` runs the paper's own use of the seven tasks instead
(Table 6: one row per formula, 72/8/20, both protocols); ``--paper --help`` shows its options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import paper_protocol
import submission
from command_line import runner_parser
from folds import FoldStore, in_parallel, output_folder, unfinished_folder
from labels import refuse_learned
from matbench.task import MatbenchTask
from protocols import (
    DEFAULTS,
    LARGE,
    PROTOCOLS,
    Settings,
    defaults_of,
    train_and_predict,
)
from scores import KEYS, merge_rows, other_folds, score_rows, summary
from targets import matbench_targets
from tasks import (
    EMBEDDED_FORMULAS,
    EMBEDDED_TARGETS,
    DataNotFoundError,
    default_tasks,
    embedded_note,
    full_name,
    load_task,
    task_inputs,
)
from tqdm import tqdm

from polysrl_dc.checkpoints import DEFAULT_ENCODER
from polysrl_dc.errors import InvalidInputError

MODEL = "PolySRL"
PAPER_DESCRIPTION = "The seven Matbench tasks of the paper's Table 6, one row per formula, 72/8/20."
Learner = Callable[..., tuple[Any, Any, dict[str, Any]]]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line; unknown tasks, folds and settings end it with one line."""
    parser = runner_parser(
        __doc__, "folder with matbench/*.csv.gz; or POLYSRL_DATA", epilog=_told_defaults()
    )
    add = parser.add_argument
    add("--suite", choices=("matbench", "embedded"), default="matbench")
    add("--tasks", nargs="+", help="names with or without matbench_ (default: the paper's seven)")
    add("--protocol", choices=PROTOCOLS, default="finetune")
    add("--folds", nargs="+", type=int, choices=range(5), default=list(range(5)), metavar="0-4")
    add("--epochs", nargs="+", type=_positive(int), help="grid, chosen by validation")
    members = "models averaged; default with several encoders: one for each"
    add("--ensemble", type=_positive(int), help=members)
    encoder = f"names, folders or files; none: random weights; default: {DEFAULT_ENCODER}"
    add("--pretrained", nargs="+", default=[DEFAULT_ENCODER], metavar="ENCODER", help=encoder)
    add("--jobs", type=_positive(int), default=1, help="folds trained at once, a process each")
    add("--learning-rates", nargs="+", type=_positive(float), help="grid, chosen by validation")
    add("--batch-size", type=_positive(int))
    add("--weight-decay", type=_positive(float, or_zero=True))
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda, ... (default: the model's own choice)")
    add("--threads", type=_positive(int), default=1, help="threads of one process")
    add("--dry-run", action="store_true", help="show what would run; train and write nothing")
    arguments = parser.parse_args(argv)
    try:
        names = [full_name(name) for name in arguments.tasks or default_tasks(arguments.suite)]
    except ValueError as error:
        parser.error(str(error))
    for name in names:
        if (name in EMBEDDED_TARGETS) != (arguments.suite == "embedded"):
            parser.error(f"the task {name} is not of the suite {arguments.suite}")
    if arguments.pretrained == ["none"]:
        arguments.pretrained = []
    if "none" in arguments.pretrained:
        parser.error("--pretrained names encoders, or none alone")
    n_encoders = len(arguments.pretrained)
    if n_encoders > 1:
        arguments.ensemble = arguments.ensemble or n_encoders
        if arguments.ensemble % n_encoders:
            parser.error(f"--ensemble {arguments.ensemble}: no multiple of {n_encoders} encoders")
    arguments.tasks = list(dict.fromkeys(names))
    arguments.folds = sorted(set(arguments.folds))
    return arguments


def _positive(kind: type, or_zero: bool = False) -> Callable[[str], Any]:
    wanted = "positive or zero" if or_zero else "positive"

    def parse(text: str) -> Any:
        value = kind(text)
        if not (0 < value < float("inf") or (or_zero and value == 0)):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    parse.__name__ = f"{wanted} {kind.__name__}"
    return parse


def training_arguments(settings: Settings) -> str:
    """The options that give these settings, but for the encoder, the seed and the machine."""
    rates = [f"{rate:g}" for rate in settings.learning_rates]
    return (
        f"--epochs {' '.join(map(str, settings.epochs))} --ensemble {settings.ensemble} "
        f"--learning-rates {' '.join(rates)} --batch-size {settings.batch_size} "
        f"--weight-decay {settings.weight_decay:g}"
    )


def _told_defaults() -> str:
    told = {"large": f"finetune, {LARGE:,} rows and more", "embedded": "finetune, embedded suite"}
    lines = [f"  {told.get(name, name)}: {training_arguments(it)}" for name, it in DEFAULTS.items()]
    return "\n".join(["defaults:", *lines])


def settings_of(arguments: argparse.Namespace, n_rows: int) -> Settings:
    """Settings of the learner on a task of so many rows: the command line, else the defaults."""
    given: dict[str, Any] = {}
    for name in ("epochs", "learning_rates", "ensemble", "batch_size", "weight_decay"):
        value = getattr(arguments, name)
        if value is not None:
            given[name] = tuple(value) if isinstance(value, list) else value
    return replace(
        defaults_of(arguments.protocol, arguments.suite, n_rows),
        pretrained=tuple(arguments.pretrained),
        seed=arguments.seed,
        device=arguments.device,
        threads=arguments.threads,
        **given,
    )


def store_of(arguments: argparse.Namespace, settings: Settings, task: MatbenchTask) -> FoldStore:
    """The store of a task's finished folds, whose key holds everything that changes them."""
    key = {"model": MODEL, "protocol": arguments.protocol, **settings.fingerprint()}
    key |= {"benchmark": task.benchmark_name, "n_samples": int(task.metadata.n_samples)}
    return FoldStore(arguments.output_dir / "folds", task.dataset_name, key)


def restore(task: MatbenchTask, store: FoldStore) -> None:
    """Record every fold of the task that its store holds and that is not yet recorded."""
    for fold in (number for number in task.folds if not task.is_recorded[number]):
        kept = store.load(fold, task.validation[task.folds_map[fold]].test)
        if kept is not None:
            submission.record_fold(task, fold, kept["predictions"], kept["std"], kept["params"])


def run_task(
    task: MatbenchTask,
    store: FoldStore,
    arguments: argparse.Namespace,
    settings: Settings,
    learner: Learner,
    bar: tqdm,
) -> None:
    """Train and record the folds that are asked for and not yet recorded."""
    restore(task, store)
    missing = [fold for fold in arguments.folds if not task.is_recorded[fold]]
    bar.update(len(arguments.folds) - len(missing))
    calls = (
        (
            fold,
            store.unfinished(fold),
            learner,
            task.metadata.task_type,
            *task_inputs(task, fold),
            arguments.protocol,
            settings,
        )
        for fold in missing
    )
    bar.set_postfix_str(f"{task.dataset_name}: folds {missing or 'all recorded'}")
    for fold, result in in_parallel(_learn, calls, arguments.jobs):
        submission.record_fold(task, fold, *result)
        store.save(fold, *submission.recorded_fold(task, fold))
        bar.update()


def _learn(
    fold: int, unfinished: Path, learner: Learner, *args: Any
) -> tuple[int, tuple[Any, Any, dict[str, Any]]]:
    """Run the learner, in a process of its own if there are several; keep the fold's number."""
    with unfinished_folder(unfinished) as place:
        return fold, learner(*args, place)


def write_results(
    task: MatbenchTask, arguments: argparse.Namespace, settings: Settings, store: FoldStore
) -> Path | None:
    """Put a task into the score table and, when all its folds are there, into the submission.

    Where the table has folds that the store lacks, other settings have made them, or the store is
    gone: the table then stays as it is until all folds are there.
    """
    restore(task, store)  # what other processes have finished meanwhile
    fresh = score_rows(task, arguments.suite, arguments.protocol, MODEL, settings.seed)
    path = arguments.output_dir / "scores.csv"
    if others := other_folds(path, fresh):
        print(f"{path} stays as it is: folds {others} of {task.dataset_name} are of another run")
    else:
        merge_rows(path, fresh, KEYS, digits=None)
    folder = submission.record_folder(arguments.output_dir, task.benchmark_name, arguments.protocol)
    description = {
        "arguments": repeat_arguments(arguments, settings, task.dataset_name),
        "settings_key": store.key,
        **store.settings,
    }
    notes = embedded_note() if arguments.suite == "embedded" else ""
    return submission.write_record(
        folder, [task], {task.dataset_name: description}, arguments.protocol, notes
    )


def repeat_arguments(arguments: argparse.Namespace, settings: Settings, task: str) -> list[str]:
    """The command line that repeats one task of this run."""
    return (
        f"--suite {arguments.suite} --tasks {task} --protocol {arguments.protocol} "
        f"{training_arguments(settings)} "
        f"--seed {settings.seed} --pretrained {' '.join(settings.pretrained) or 'none'}"
    ).split()


def main(argv: list[str] | None = None, learner: Learner = train_and_predict) -> int:
    """Run the command; ``learner`` stands in for the model in tests."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--paper"]:
        paper_protocol.main(argv[1:], "paper", matbench_targets, PAPER_DESCRIPTION)
        return 0
    arguments = parse_arguments(argv)
    try:
        for encoder, name in product(arguments.pretrained, arguments.tasks):
            refuse_learned(encoder, name, arguments.folds)
        tasks = [load_task(name, arguments.data_dir) for name in arguments.tasks]
    except (DataNotFoundError, InvalidInputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = [settings_of(arguments, task.metadata.n_samples) for task in tasks]
    stores = [store_of(arguments, *pair) for pair in zip(settings, tasks, strict=True)]
    if arguments.suite == "embedded":
        print(f"embedded suite ({EMBEDDED_FORMULAS:,} formulas): {embedded_note()}")
    if arguments.dry_run:
        _print_plan(tasks, stores, arguments)
        return 0
    written: Path | None = None
    bar = tqdm(total=len(tasks) * len(arguments.folds), unit="fold")
    with output_folder(arguments.output_dir), bar:
        for task, store, chosen in zip(tasks, stores, settings, strict=True):
            run_task(task, store, arguments, chosen, learner, bar)
            written = write_results(task, arguments, chosen, store) or written
    print(f"{tasks[0].benchmark_name}, {arguments.protocol}, seed {arguments.seed}")
    print(summary(tasks, arguments.data_dir))
    print(f"scores: {arguments.output_dir / 'scores.csv'}")
    print(f"record: {written or 'none, as no task has all its folds'}")
    return 0


def _print_plan(
    tasks: list[MatbenchTask], stores: list[FoldStore], arguments: argparse.Namespace
) -> None:
    print("DRY RUN: nothing is trained and nothing is written")
    for task, store in zip(tasks, stores, strict=True):
        restore(task, store)
        missing = [fold for fold in arguments.folds if not task.is_recorded[fold]]
        print(
            f"{task.dataset_name}: {len(task.df):,} rows, {task.metadata.task_type}, "
            f"folds to train: {missing or 'none'}, settings {store.key}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
