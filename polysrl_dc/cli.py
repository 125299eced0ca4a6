"""The console command ``polysrl``: embed, train, predict, retrieve, domain and pretrain."""

import argparse
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepchem as dc
import numpy as np
import pandas as pd
from tqdm import tqdm

from polysrl_dc.cross_validation import StoichiometrySplitter, cross_val_predict, row_groups
from polysrl_dc.datasets import PolymorphDataset, drop_skipped
from polysrl_dc.domain import Domain, OutsideDomainWarning
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import StoichiometryGraphFeaturizer, StructureGraphFeaturizer
from polysrl_dc.model import PolySRLModel
from polysrl_dc.options import check, follow_recipe, parser
from polysrl_dc.recalibration import UncalibratedWarning
from polysrl_dc.resumption import UNFINISHED, fit_in
from polysrl_dc.sources import read_structure
from polysrl_dc.tables import check_table, numbers, predictions, read_table, ungrouped, write_table

_SHOWN = 10  # of many that are skipped for the same reason


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``polysrl``.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line without the program's name; ``sys.argv`` by default.

    Returns
    -------
    int
        Exit status: 0, or 2 after a one-line message on standard error; 130 if interrupted.

    Examples
    --------
    >>> main(["embed"])
    2
    """
    commands = (embed, train, predict, retrieve, domain, pretrain)
    options = parser(commands).parse_args(arguments)
    try:
        check(options)
        options.command(options)
    except KeyboardInterrupt:
        left = hasattr(options, "output_dir") and _unfinished(options).exists()
        more = "; the same command goes on from its last checkpoint" if left else ""
        print(f"polysrl {options.name}: interrupted{more}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of standard output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, FloatingPointError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        print(f"polysrl {options.name}: error: {lines[0]}", file=sys.stderr)
        return 2
    return 0


def embed(options: argparse.Namespace) -> None:
    """Formulas -> columns ``polymorphism``, if the model tells it, and ``embedding_0`` ..."""
    frame, dataset = _formulas(options)
    model = PolySRLModel.from_pretrained(options.model)
    embedding = pd.DataFrame(model.predict_embedding(dataset)).add_prefix("embedding_")
    if any(model.variance_trained):
        embedding.insert(0, "polymorphism", model.predict_polymorphism(dataset))
    else:
        print(f"no column polymorphism: {options.model} has no trained variance", file=sys.stderr)
    write_table(frame, embedding, options.output)


def train(options: argparse.Namespace) -> None:
    """Formulas and labels -> a model folder, and its score on formulas it has not learned from."""
    group = [] if options.group is None else [options.group]
    frame, dataset = _formulas(options, [*options.target, *group])
    dataset = _labeled(options, frame, dataset)
    frame = frame.loc[dataset.ids]
    follow_recipe(options, len(dataset))
    held_out, predicted = None, None
    groups = frame[options.group].tolist() if group else None
    if options.folds:
        n_groups = row_groups(dataset, groups).max() + 1
        if not 2 <= options.folds <= n_groups:
            what = "formulas" if groups is None else f"groups by {options.group!r} and formula"
            raise InvalidInputError(
                f"--folds {options.folds}: must be from 2 to {n_groups}, the different {what}"
            )
        held_out = dataset
    elif options.hold_out:
        dataset, held_out = StoichiometrySplitter(groups).train_test_split(
            dataset, frac_train=1 - options.hold_out, seed=options.seed
        )
        if not (len(dataset) and len(held_out)):
            raise InvalidInputError(
                f"--hold-out {options.hold_out} leaves {len(dataset)} rows to train on and "
                f"{len(held_out)} to score on"
            )
        for name, known in zip(options.target, dataset.w.any(0), strict=True):
            if not known:
                raise InvalidInputError(
                    f"--hold-out {options.hold_out} leaves no label of {name!r} to train on"
                )
    if held_out is not None and options.predictions:
        check_table(frame.loc[held_out.ids], options.target, options.predictions)
    with _naming(options.target):
        if options.folds:
            chosen = {"seed": options.seed, "groups": groups}
            folds = (f"without fold {fold + 1} of {options.folds}" for fold in range(options.folds))
            each = partial(_trained, options, folds)
            predicted = cross_val_predict(each, dataset, options.folds, **chosen)
        model = _trained(options, iter(["the model"]), dataset)
    if options.task == "regression":
        if held_out is None:
            print("std is not calibrated and too small: --folds 5 calibrates it", file=sys.stderr)
        else:
            _calibrate(model, held_out, predicted, options.target)
    model.save(options.output_dir)
    print(f"model written to {options.output_dir}", file=sys.stderr)
    if held_out is not None:
        mean, std = predicted or model.predict_uncertainty(held_out)
        if predicted and model.calibration:
            std = model.calibration.apply(std)
        for task, name in enumerate(options.target):
            _print_score(options.task, name, held_out, mean, task)
        if options.predictions:
            found = predictions(mean, std, options.target)
            write_table(frame.loc[held_out.ids], found, options.predictions)
    shutil.rmtree(_unfinished(options), ignore_errors=True)


def predict(options: argparse.Namespace) -> None:
    """Formulas -> columns ``prediction`` and ``std``; of several targets, with their names."""
    model = PolySRLModel.from_pretrained(options.model)
    frame, dataset = _formulas(options)
    mean, std = model.predict_uncertainty(dataset)
    targets = model.provenance.get("targets", range(mean.shape[1]))
    found = predictions(mean, std, targets)
    if model.settings["task"] == "regression":
        left = model.calibration.uncalibrated if model.calibration else range(mean.shape[1])
        if left:
            names = ", ".join(found.columns[mean.shape[1] + task] for task in left)
            print(f"not calibrated and too small: {names}", file=sys.stderr)
    write_table(frame, found, options.output)


def retrieve(options: argparse.Namespace) -> None:
    """Formulas and candidate structures -> the ``k`` likeliest candidates of each formula."""
    frame, dataset = _formulas(options)
    candidates = _structures(options.structures, options.on_error)
    if not isinstance(candidates, PolymorphDataset):
        candidates = PolymorphDataset.from_graphs(candidates.X, candidates.ids)
    k = min(options.k, len(candidates))
    indices, probabilities = PolySRLModel.from_pretrained(options.model).retrieve(
        dataset, candidates, k
    )
    found = {
        "rank": np.tile(np.arange(1, k + 1), len(frame)),
        "structure": candidates.ids[indices.ravel()],
        "structure_formula": candidates.formulas[indices.ravel()],
        "probability": probabilities.ravel(),
    }
    write_table(frame.loc[frame.index.repeat(k)], pd.DataFrame(found), options.output)


def domain(options: argparse.Namespace) -> None:
    """Formulas and a reference -> the ``k`` nearest reference formulas of each, and its domain."""
    frame, dataset = _formulas(options)
    model = PolySRLModel.from_pretrained(options.model)
    if options.structures:
        reference = _structures(options.structures, options.on_error)
    else:
        reference = _learned_from(options, model)
    known = Domain(model, reference)
    k = min(options.k, len(known.formulas))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutsideDomainWarning)  # said below, in one line
        found = known.query(dataset, k).reset_index(drop=True)
    found["structures"] = [";".join(map(str, ids)) for ids in found["structures"]]
    write_table(frame.loc[frame.index.repeat(k)], found, options.output)
    print(
        f"{found['outside'][::k].sum()} of {len(frame)} formulas lie outside: an element not seen, "
        f"or further than {known.threshold:.3f} from all {len(known.formulas):,} of the reference",
        file=sys.stderr,
    )


def pretrain(options: argparse.Namespace) -> None:
    """Crystal structures -> a folder with a pretrained encoder."""
    dataset = _structures(options.structures, options.on_error)
    model = PolySRLModel("pretraining", **_training(options))
    fit_in(_unfinished(options), model, dataset, options.epochs).save(options.output_dir)
    shutil.rmtree(_unfinished(options), ignore_errors=True)
    print(f"encoder written to {options.output_dir}", file=sys.stderr)


def _formulas(
    options: argparse.Namespace, others: Sequence[str] = ()
) -> tuple[pd.DataFrame, dc.data.Dataset]:
    """The table of formulas, as given or read, and its dataset; the rows of both correspond."""
    given = getattr(options, "formulas", [])
    if bool(given) == (options.input is not None):
        raise InvalidInputError(
            "give either formulas or --input FILE; formulas go before the options"
        )
    if options.input is not None:
        frame = read_table(options.input, [options.column, *others])
    else:
        frame = pd.DataFrame({options.column: given})
    graphs = StoichiometryGraphFeaturizer(options.on_error).featurize(frame[options.column])
    dataset = drop_skipped(dc.data.NumpyDataset(graphs, ids=frame.index.to_numpy()))
    if len(dataset) == 0:
        raise InvalidInputError("no usable formula is left")
    return frame.loc[dataset.ids], dataset


def _learned_from(options: argparse.Namespace, model: PolySRLModel) -> dc.data.Dataset:
    """The formulas of --reference, but for the rows without a label of the targets."""
    given = {"input": options.reference, "column": options.column, "on_error": options.on_error}
    frame, dataset = _formulas(argparse.Namespace(**given), options.target or [])
    targets = options.target or [n for n in model.provenance.get("targets", []) if n in frame]
    if not targets:
        return dataset
    classes = model.settings["task"] == "classification"
    labels = np.column_stack([numbers(frame[name], classes)[0] for name in targets])
    kept = np.flatnonzero(~np.isnan(labels).all(1))
    if len(kept) == 0:
        raise InvalidInputError(f"{options.reference} has no label of {' or '.join(targets)}")
    _say_unlabeled(len(dataset) - len(kept), targets)
    return dataset.select(kept)


def _say_unlabeled(n_rows: int, targets: Sequence[str]) -> None:
    if n_rows:
        print(f"rows without {' or '.join(targets)}, left out: {n_rows}", file=sys.stderr)


def _say_skipped(texts: Sequence[str], what: str) -> None:
    for text in texts[:_SHOWN]:
        print(f"skipped {text}", file=sys.stderr)
    if len(texts) > _SHOWN:
        print(f"skipped {len(texts)} {what} in all", file=sys.stderr)


def _labeled(
    options: argparse.Namespace, frame: pd.DataFrame, dataset: dc.data.Dataset
) -> dc.data.Dataset:
    """The rows with a label, and a group if one is asked for; wrong ones are refused or skipped."""
    if len(set(options.target)) < len(options.target):
        raise InvalidInputError(f"--target names a column twice: {' '.join(options.target)}")
    classes = options.task == "classification"
    found = [numbers(frame[name], classes) for name in options.target]
    labels = np.column_stack([values for values, _ in found])
    weights = (~np.isnan(labels)).astype(float)
    kept = weights.any(1)
    empty = set(frame.index[~kept])
    for row, text in (pair for _, wrong in found for pair in wrong.items()):
        if options.on_error == "raise":
            raise InvalidInputError(text)
        print(f"skipped {'' if row in empty else 'the label in '}{text}", file=sys.stderr)
    _say_unlabeled(len(empty.difference(*(wrong for _, wrong in found))), options.target)
    labels = np.where(weights, labels, 0.0)
    dataset = dc.data.NumpyDataset(dataset.X, labels, weights, dataset.ids)
    dataset = dataset.select(np.flatnonzero(kept))
    rows = ""
    if options.group is not None:
        column = frame.loc[dataset.ids, options.group]
        missing = ungrouped(column)
        if missing and options.on_error == "raise":
            text = next(iter(missing.values()))
            raise InvalidInputError(f"{text}; --group needs all of them, or --on-error skip")
        _say_skipped(list(missing.values()), "rows")
        dataset = dataset.select(np.flatnonzero(~column.index.isin(list(missing))))
        rows = f" in the rows with {options.group!r}"
    for name, known in zip(options.target, dataset.w.any(0), strict=True):
        if not known:
            raise InvalidInputError(f"the column {name!r} has no number{rows}")
    return dataset


def _structures(paths: Sequence[str], on_error: str) -> dc.data.Dataset:
    """Structure graphs of one source of PolymorphDataset, or of files of one structure each."""
    skipped: list[tuple[str, str]] = []
    dataset: dc.data.Dataset
    if len(paths) == 1:
        dataset = PolymorphDataset(paths[0], on_error=on_error)
        skipped = dataset.skipped
    else:
        for path in paths:
            if Path(path).is_dir() or path.lower().endswith(".parquet"):
                raise InvalidInputError(
                    f"{path} is one of {len(paths)} sources: give one table or one folder alone, "
                    "or files of one structure each"
                )
        structures = {}
        for path in tqdm(paths, unit="file", disable=None):
            try:
                structures[path] = read_structure(path)
            except InvalidInputError as error:
                if on_error == "raise":
                    raise InvalidInputError(f"{path}: {error}") from error
                skipped.append((path, str(error)))
        featurizer = StructureGraphFeaturizer(on_error=on_error)
        graphs = featurizer.featurize(pd.Series(structures, dtype=object))
        dataset = dc.data.NumpyDataset(graphs, ids=np.array(list(structures), dtype=object))
        dataset = drop_skipped(dataset) if structures else dataset
    _say_skipped([f"{name}: {message}" for name, message in skipped], "structures")
    if len(dataset) == 0:
        raise InvalidInputError("no usable structure is left")
    return dataset


def _training(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
    }


def _trained(
    options: argparse.Namespace, names: Iterator[str], dataset: dc.data.Dataset
) -> PolySRLModel:
    model = PolySRLModel(
        options.task,
        len(options.target),
        pretrained=[None if name == "none" else name for name in options.pretrained],
        freeze_encoder=options.freeze_encoder,
        n_ensemble=options.ensemble,
        **_training(options),
    )
    model.provenance |= {"targets": options.target, "recipe": options.recipe}
    return fit_in(_unfinished(options), model, dataset, options.epochs, next(names))


def _unfinished(options: argparse.Namespace) -> Path:
    """Where the parts of a training lie until the command ends."""
    return Path(options.output_dir) / UNFINISHED


def _calibrate(
    model: PolySRLModel,
    held_out: dc.data.Dataset,
    predicted: tuple[np.ndarray, np.ndarray] | None,
    targets: Sequence[str],
) -> None:
    try:
        with _naming(targets), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UncalibratedWarning)
            left = model.calibrate(held_out, predicted=predicted).uncalibrated
    except InvalidInputError as error:
        print(f"std is not calibrated: {error}", file=sys.stderr)
        return
    counts = np.delete(np.count_nonzero(held_out.w, axis=0), left)
    labels = " and ".join(map(str, counts))
    print(f"std is calibrated on {labels} held-out labels", file=sys.stderr)
    for warning in caught:
        print(_by_name(str(warning.message), targets), file=sys.stderr)


@contextmanager
def _naming(targets: Sequence[str]) -> Iterator[None]:
    """Errors of the model, which number its tasks, with the names of the columns."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(_by_name(str(error), targets)) from error


def _by_name(text: str, targets: Sequence[str]) -> str:
    return re.sub(r"\btask (\d+)", lambda match: targets[int(match[1])], text)


def _print_score(
    kind: str, name: str, held_out: dc.data.Dataset, mean: np.ndarray, task: int
) -> None:
    """The score of one target, on the rows that have its label."""
    known = held_out.w[:, task] > 0
    labels, found = held_out.y[known, task], mean[known, task]
    if kind == "classification" and len(np.unique(labels)) < 2:
        print(f"roc_auc_score of {name}: needs held-out labels of both classes", file=sys.stderr)
    elif known.any():
        score = dc.metrics.mae_score if kind == "regression" else dc.metrics.roc_auc_score
        value = f"{score(labels, found):.4g} on {known.sum()} held-out labels"
        print(f"{score.__name__} of {name}: {value}", file=sys.stderr)
