"""The console command ``polysrl``: embed, train, predict, retrieve, domain and pretrain."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepchem as dc
import numpy as np
import pandas as pd
from tqdm import tqdm

from polysrl_dc.checkpoints import DEFAULT_ENCODER, checkpoint_path
from polysrl_dc.cross_validation import StoichiometrySplitter, cross_val_predict, row_groups
from polysrl_dc.datasets import PolymorphDataset, drop_skipped
from polysrl_dc.domain import Domain, OutsideDomainWarning
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import StoichiometryGraphFeaturizer, StructureGraphFeaturizer
from polysrl_dc.model import PolySRLModel
from polysrl_dc.options import parser
from polysrl_dc.recalibration import LEAST
from polysrl_dc.recipes import RECIPES, suitable_recipe
from polysrl_dc.sources import read_structure
from polysrl_dc.tables import MISSING, check_names, numbers, read_table, write_table

_SHOWN = 10  # skipped structures that are named


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
        _keep_inputs(options)
        options.command(options)
    except KeyboardInterrupt:
        print(f"polysrl {options.name}: interrupted", file=sys.stderr)
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
    """Formulas -> columns ``polymorphism`` and ``embedding_0`` ..."""
    frame, dataset = _formulas(options)
    model = PolySRLModel.from_pretrained(options.model)
    embedding = pd.DataFrame(model.predict_embedding(dataset)).add_prefix("embedding_")
    embedding.insert(0, "polymorphism", model.predict_polymorphism(dataset))
    write_table(frame, embedding, options.output)


def train(options: argparse.Namespace) -> None:
    """Formulas and labels -> a model folder, and its score on formulas it has not learned from."""
    for name in ("predictions", "group"):
        if getattr(options, name) is not None and not (options.folds or options.hold_out):
            raise InvalidInputError(f"--{name} needs --folds or --hold-out")
    named = [] if options.group is None else [options.group]
    frame, dataset = _formulas(options, options.target, named)
    _follow_recipe(options, len(dataset))
    held_out, predicted = None, None
    if options.predictions:
        check_names(frame, _columns(options.target))
    groups = None if options.group is None else _group_labels(frame[options.group])
    if options.folds:
        n_groups = row_groups(dataset, groups).max() + 1
        if not 2 <= options.folds <= n_groups:
            what = "formulas" if groups is None else f"groups by {options.group!r} and formula"
            raise InvalidInputError(
                f"--folds {options.folds}: must be from 2 to {n_groups}, the different {what}"
            )
        held_out = dataset
        each = partial(_trained, options)
        chosen = {"seed": options.seed, "groups": groups}
        predicted = cross_val_predict(each, dataset, options.folds, **chosen)
    elif options.hold_out:
        dataset, held_out = StoichiometrySplitter(groups).train_test_split(
            dataset, frac_train=1 - options.hold_out, seed=options.seed
        )
        if not (len(dataset) and len(held_out)):
            raise InvalidInputError(
                f"--hold-out {options.hold_out} leaves {len(dataset)} rows to train on and "
                f"{len(held_out)} to score on"
            )
    model = _trained(options, dataset)
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
        if options.predictions:
            found = _predictions(mean, std, options.target)
            write_table(frame.loc[held_out.ids], found, options.predictions)
        for task, name in enumerate(options.target):
            _print_score(options.task, name, held_out, mean, task)


def predict(options: argparse.Namespace) -> None:
    """Formulas -> columns ``prediction`` and ``std``; of several targets, with their names."""
    model = PolySRLModel.from_pretrained(options.model)
    frame, dataset = _formulas(options)
    mean, std = model.predict_uncertainty(dataset)
    targets = model.provenance.get("targets", range(mean.shape[1]))
    write_table(frame, _predictions(mean, std, targets), options.output)


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
    if options.structures:
        reference = _structures(options.structures, options.on_error)
    else:
        table = {"input": options.reference, "column": options.column, "on_error": options.on_error}
        reference = _formulas(argparse.Namespace(**table))[1]
    known = Domain(PolySRLModel.from_pretrained(options.model), reference)
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
    _fit(model, dataset, options.epochs)
    model.save(options.output_dir)
    print(f"encoder written to {options.output_dir}", file=sys.stderr)


def _formulas(
    options: argparse.Namespace, targets: Sequence[str] = (), others: Sequence[str] = ()
) -> tuple[pd.DataFrame, dc.data.Dataset]:
    """The table of formulas, as given or read, and its dataset; the rows of both correspond."""
    given = getattr(options, "formulas", [])
    if bool(given) == (options.input is not None):
        raise InvalidInputError(
            "give either formulas or --input FILE; formulas go before the options"
        )
    if options.input is not None:
        frame = read_table(options.input, [options.column, *targets, *others])
    else:
        frame = pd.DataFrame({options.column: given})
    graphs = StoichiometryGraphFeaturizer(options.on_error).featurize(frame[options.column])
    dataset = drop_skipped(dc.data.NumpyDataset(graphs, ids=frame.index.to_numpy()))
    frame = frame.loc[dataset.ids]
    if targets and len(dataset):
        dataset = _labeled(options, frame, dataset)
        frame = frame.loc[dataset.ids]
    if len(dataset) == 0:
        raise InvalidInputError("no usable formula is left")
    return frame.copy(), dataset


def _group_labels(column: pd.Series) -> list[Any]:
    """The fields of a column, none of which may be missing."""
    for row, value in column.items():
        if not pd.api.types.is_scalar(value):
            raise InvalidInputError(f"row {row}: {column.name} is {value!r}, not a name or number")
        if pd.isna(value) or value in MISSING:
            raise InvalidInputError(
                f"row {row}: {column.name} is {value!r}, which means that it is missing; "
                "--group needs all of them"
            )
    return column.tolist()


def _keep_inputs(options: argparse.Namespace) -> None:
    """Refuse to write over what is read."""
    read = [getattr(options, name, None) for name in ("input", "reference")]
    for name in ("output", "predictions"):
        path = getattr(options, name, None)
        for source in read:
            if path and source and os.path.realpath(path) == os.path.realpath(source):
                raise InvalidInputError(f"--{name} {path} is the table that is read")
    for encoder in getattr(options, "pretrained", None) or []:
        folder = checkpoint_path(encoder).parent
        if encoder != "none" and os.path.realpath(folder) == os.path.realpath(options.output_dir):
            raise InvalidInputError(
                f"--output-dir {options.output_dir} holds the encoder {encoder}"
            )


def _labeled(
    options: argparse.Namespace, frame: pd.DataFrame, dataset: dc.data.Dataset
) -> dc.data.Dataset:
    """The dataset with labels; rows with a wrong one are refused or skipped."""
    if len(set(options.target)) < len(options.target):
        raise InvalidInputError(f"--target names a column twice: {' '.join(options.target)}")
    classes = options.task == "classification"
    found = {name: numbers(frame[name], classes) for name in options.target}
    wrong = {row: text for _, texts in found.values() for row, text in texts.items()}
    for text in wrong.values():
        if options.on_error == "raise":
            raise InvalidInputError(text)
        print(f"skipped {text}", file=sys.stderr)
    labels = np.column_stack([values for values, _ in found.values()])
    weights = (~np.isnan(labels)).astype(float)
    kept = np.flatnonzero(~frame.index.isin(list(wrong)))
    for name, known in zip(options.target, weights[kept].any(0), strict=True):
        if not known:
            raise InvalidInputError(f"the column {name!r} has no number")
    labels = np.where(weights, labels, 0.0)
    return dc.data.NumpyDataset(dataset.X, labels, weights, dataset.ids).select(kept)


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
    for name, message in skipped[:_SHOWN]:
        print(f"skipped {name}: {message}", file=sys.stderr)
    if len(skipped) > _SHOWN:
        print(f"skipped {len(skipped)} structures in all", file=sys.stderr)
    if len(dataset) == 0:
        raise InvalidInputError("no usable structure is left")
    return dataset


def _follow_recipe(options: argparse.Namespace, n_rows: int) -> None:
    """Set what no option says, by the recipe that is named or suits the number of rows."""
    name = options.recipe or suitable_recipe(n_rows)
    told = options.pretrained or options.freeze_encoder or options.ensemble
    if told and not options.recipe:  # how, but not in what batches
        name = name if name == "large" else "single"
        options.pretrained = options.pretrained or [DEFAULT_ENCODER]
    recipe, options.recipe = RECIPES[name], name
    for setting, value in {"epochs": recipe.epochs, **recipe.settings}.items():
        given = getattr(options, setting)
        if given is None or given is False:
            setattr(options, setting, value)
    options.pretrained = list(options.pretrained or [DEFAULT_ENCODER])
    what = "heads" if options.freeze_encoder else "encoders and heads"
    print(
        f"recipe {name}: {what} on {', '.join(options.pretrained)}, {options.epochs} epochs, "
        f"{options.batch_size} rows a step, learning rate {options.learning_rate:g}",
        file=sys.stderr,
    )


def _training(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
    }


def _trained(options: argparse.Namespace, dataset: dc.data.Dataset) -> PolySRLModel:
    model = PolySRLModel(
        options.task,
        len(options.target),
        pretrained=[None if name == "none" else name for name in options.pretrained],
        freeze_encoder=options.freeze_encoder,
        n_ensemble=options.ensemble,
        **_training(options),
    )
    model.provenance |= {"targets": options.target, "recipe": options.recipe}
    _fit(model, dataset, options.epochs)
    return model


def _fit(model: PolySRLModel, dataset: dc.data.Dataset, epochs: int) -> None:
    steps = epochs * -(-len(dataset) // model.batch_size)
    with tqdm(total=steps, unit="step", disable=None) as bar:
        model.fit(dataset, nb_epoch=epochs, callbacks=[lambda model, step: bar.update()])


def _calibrate(
    model: PolySRLModel,
    held_out: dc.data.Dataset,
    predicted: tuple[np.ndarray, np.ndarray] | None,
    targets: Sequence[str],
) -> None:
    counts = np.count_nonzero(held_out.w, axis=0)
    few = [f"{n} labels of {name}" for n, name in zip(counts, targets, strict=True) if n < LEAST]
    try:
        if few:
            raise InvalidInputError(f"{', '.join(few)} held out, at least {LEAST} are needed")
        model.calibrate(held_out, predicted=predicted)
        labels = " and ".join(map(str, counts))
        print(f"std is calibrated on {labels} held-out labels", file=sys.stderr)
    except InvalidInputError as error:
        print(f"std is not calibrated: {error}", file=sys.stderr)


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


def _predictions(mean: np.ndarray, std: np.ndarray, targets: Sequence[str] | range) -> pd.DataFrame:
    """Columns ``prediction`` and ``std``; of several targets, with their names."""
    return pd.DataFrame(np.hstack([mean, std]), columns=_columns(targets))


def _columns(targets: Sequence[str] | range) -> list[str]:
    ends = [f"_{target}" for target in targets] if len(targets) > 1 else [""]
    return [name + end for name in ("prediction", "std") for end in ends]
