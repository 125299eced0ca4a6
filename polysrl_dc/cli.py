"""The console command ``polysrl``: embed, train, predict, retrieve, domain, info and pretrain."""

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

from polysrl_dc.checkpoints import MODEL_FILE, shipped_encoders
from polysrl_dc.cross_validation import (
    HeldOut,
    StoichiometrySplitter,
    cross_val_predict,
    row_groups,
)
from polysrl_dc.datasets import PolymorphDataset
from polysrl_dc.domain import Domain, OutsideDomainWarning, keep_formulas
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.inputs import (
    at_most,
    number_of,
    read_formulas,
    read_labels,
    read_reference,
    read_structures,
)
from polysrl_dc.metrics import relative_error, score_lines
from polysrl_dc.model import PolySRLModel
from polysrl_dc.options import check, follow_recipes, parser
from polysrl_dc.recalibration import LEAST, UncalibratedWarning
from polysrl_dc.resumption import UNFINISHED, fit_in
from polysrl_dc.tables import (
    check_table,
    for_each,
    prediction_names,
    predictions,
    write_table,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``polysrl``.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line without the program's name; ``sys.argv`` by default.

    Returns
    -------
    int
        Exit status: 0, or 2 after a one-line message on standard error; 130 if interrupted, 1 if
        the reader of standard output has gone.

    Examples
    --------
    >>> main(["embed"])
    2
    """
    commands = (embed, train, predict, retrieve, domain, info, pretrain)
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
        line = " ".join(str(error).splitlines()) or type(error).__name__
        print(f"polysrl {options.name}: error: {line}", file=sys.stderr)
        return 2
    return 0


def embed(options: argparse.Namespace) -> None:
    """Formulas -> columns ``polymorphism``, if the model tells it, and ``embedding_0`` ..."""
    model = PolySRLModel.from_pretrained(options.model)
    frame, dataset = read_formulas(options)
    check_table(frame, list(_embedded(model, dataset.select([0]))), options.output)
    if not any(model.variance_trained):
        print(f"no column polymorphism: {options.model} has no trained variance", file=sys.stderr)
    write_table(frame, _embedded(model, dataset), options.output)


def _embedded(model: PolySRLModel, dataset: dc.data.Dataset) -> pd.DataFrame:
    embedding = pd.DataFrame(model.predict_embedding(dataset)).add_prefix("embedding_")
    if any(model.variance_trained):
        embedding.insert(0, "polymorphism", model.predict_polymorphism(dataset))
    return embedding


def train(options: argparse.Namespace) -> None:
    """Formulas and labels -> a model folder, and its score on formulas it has not learned from."""
    group = [] if options.group is None else [options.group]
    frame, dataset = read_formulas(options, [*options.target, *group])
    dataset = read_labels(options, frame, dataset)
    frame = frame.loc[dataset.ids]
    ways = follow_recipes(options, len(dataset))
    options = ways[0]  # what is not of a recipe is the same in all
    held_out, predicted = None, None
    groups = frame[options.group].tolist() if group else None
    if options.folds:
        n_groups = row_groups(dataset, groups).max() + 1
        if not 2 <= options.folds <= n_groups:
            what = "formulas" if groups is None else f"groups by {options.group!r} and formula"
            raise InvalidInputError(
                f"--folds {options.folds}: must be at least 2 and at most {n_groups}, the number "
                f"of different {what}"
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
        check_table(frame.loc[held_out.ids], prediction_names(options.target), options.predictions)
    with _naming(options.target):
        if options.folds:
            options, predicted = _best_by_folds(ways, dataset, groups)
        model = _trained(options, iter(["the model"]), dataset)
    keep_formulas(model, dataset)
    if options.task == "regression":
        if held_out is None:
            enough = dataset.w.any(1).sum() >= LEAST
            advice = "--folds 5 calibrates it" if enough else f"that needs {LEAST} labels"
            print(f"std is not calibrated and too small: {advice}", file=sys.stderr)
        else:
            _calibrate(model, held_out, predicted, options.target)
    _save(model, options.output_dir)
    if held_out is not None:
        if predicted is None:
            mean, std = model.predict_uncertainty(held_out)
        else:
            mean, std, distance = predicted
            std = model.calibration.apply(std, distance) if model.calibration else std
        for line in score_lines(options.target, held_out.y, mean, held_out.w, options.task):
            print(line, file=sys.stderr)
        if options.predictions:
            found = predictions(mean, std, options.target)
            write_table(frame.loc[held_out.ids], found, options.predictions)
    shutil.rmtree(_unfinished(options), ignore_errors=True)


def _best_by_folds(
    ways: list[argparse.Namespace], dataset: dc.data.Dataset, groups: list[Any] | None
) -> tuple[argparse.Namespace, HeldOut]:
    """The options whose models have the lowest error on formulas not learned from, and theirs."""
    found, errors = [], []
    for way in ways:
        folds = (f"{way.recipe}, without fold {k + 1} of {way.folds}" for k in range(way.folds))
        each = partial(_trained, way, folds)
        found.append(cross_val_predict(each, dataset, way.folds, seed=way.seed, groups=groups))
        scored = dataset.y, found[-1].mean, dataset.w, way.task
        errors.append(relative_error(*scored))
        for line in score_lines(way.target, *scored) if len(ways) > 1 else ():
            print(f"{way.recipe}, {line}", file=sys.stderr)
    best = int(np.argmin(errors))
    if len(ways) > 1:
        print(f"recipe {ways[best].recipe} is kept: its error is the lowest", file=sys.stderr)
    return ways[best], found[best]


def predict(options: argparse.Namespace) -> None:
    """Formulas -> columns ``prediction``, ``std``, those asked for and ``outside``.

    Columns of several targets have their names. Whether a formula lies outside is told by models
    that hold the formulas they have learned from.
    """
    model = PolySRLModel.from_pretrained(options.model)
    if not getattr(model.model, "fitted", False):  # which a network of pretraining does not have
        raise InvalidInputError(f"{options.model} is not fitted for predictions: use polysrl train")
    frame, dataset = read_formulas(options)
    targets = model.provenance.get("targets", range(model.settings["n_tasks"]))
    known = model.domain if options.outside else None
    left = model.calibration.uncalibrated if model.calibration else range(len(targets))
    uncalibrated = ", ".join(for_each(targets, "std")[task] for task in left)
    if options.interval is not None and model.settings["task"] != "regression":
        raise InvalidInputError("--interval is for models of regression")
    if options.interval is not None and uncalibrated:
        raise InvalidInputError(f"--interval needs a calibrated std; not so: {uncalibrated}")
    names = prediction_names(targets, options.interval) + (["outside"] if known else [])
    check_table(frame, names, options.output)
    distance = known.distance(dataset) if known else None
    mean, std = model.predict_uncertainty(dataset, distance=distance)
    found = predictions(mean, std, targets, options.interval)
    if uncalibrated and model.settings["task"] == "regression":
        print(f"not calibrated and too small: {uncalibrated}", file=sys.stderr)
    if known:
        found["outside"] = known.outside(dataset, distance)
        if found["outside"].any():
            _say_outside(found, known)
    elif options.outside:
        print("no column outside: the model holds no formulas it has learned from", file=sys.stderr)
    write_table(frame, found, options.output)


def retrieve(options: argparse.Namespace) -> None:
    """Formulas and candidate structures -> the ``k`` likeliest candidates of each formula."""
    model = PolySRLModel.from_pretrained(options.model)
    model.check_retrieves()
    frame, dataset = read_formulas(options)
    names = ["rank", "structure", "structure_formula", "probability"]
    check_table(frame, names, options.output)
    candidates = read_structures(options.structures, options.on_error)
    if not isinstance(candidates, PolymorphDataset):
        candidates = PolymorphDataset.from_graphs(candidates.X, candidates.ids)
    k = at_most(options.k, len(candidates), "structure")
    same = options.same_proportions
    indices, probabilities = model.retrieve(dataset, candidates, k, same_proportions=same)
    rows, ranks = indices.ravel(), np.tile(np.arange(1, k + 1), len(frame))
    columns = (ranks, candidates.ids[rows], candidates.formulas[rows], probabilities.ravel())
    found = pd.DataFrame(dict(zip(names, columns, strict=True)))
    write_table(frame.loc[frame.index.repeat(k)], found, options.output)


def domain(options: argparse.Namespace) -> None:
    """Formulas and a reference -> the ``k`` nearest reference formulas of each, and its domain."""
    model = PolySRLModel.from_pretrained(options.model)
    frame, dataset = read_formulas(options)
    names = ["outside", "unseen", "percentile", "rank", "nearest", "distance"]
    names += ["n_structures", "structures"]
    check_table(frame, names, options.output)
    reference = None
    if options.structures:
        reference = read_structures(options.structures, options.on_error)
    elif options.reference:
        reference = read_reference(options, model)
    elif not model.provenance.get("formulas"):
        raise InvalidInputError(
            f"{options.model} does not hold the formulas it has learned from: give --reference or "
            "--structures"
        )
    known = Domain(model, reference)
    k = at_most(options.k, len(known.formulas), "formula")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutsideDomainWarning)  # said below, in one line
        found = known.query(dataset, k)[names].reset_index(drop=True)
    found["structures"] = [";".join(map(str, ids)) for ids in found["structures"]]
    write_table(frame.loc[frame.index.repeat(k)], found, options.output)
    _say_outside(found[::k], known)


def _say_outside(found: pd.DataFrame, known: Domain) -> None:
    print(
        f"{found['outside'].sum()} of {len(found)} formulas lie outside: an element not seen, or "
        f"further than {known.threshold:.3f} from all {len(known.formulas):,} of the reference",
        file=sys.stderr,
    )


def info(options: argparse.Namespace) -> None:
    """Names of models -> what each is and has learned from, a line for each thing known."""
    for number, name in enumerate(options.models or shipped_encoders()):
        model = PolySRLModel.from_pretrained(name)
        print("" if number == 0 else "\n", end="")
        for what, text in _facts(name, model).items():
            print(f"{what + ':':<14}{text}")


def _facts(name: str, model: PolySRLModel) -> dict[str, str]:
    settings, known = model.settings, model.provenance
    kind, n_tasks, data = settings["task"], settings["n_tasks"], known.get("data")
    facts = {"model": name}
    if kind == "pretraining":
        facts["predicts"] = "embeddings of formulas, and which structures they have"
    elif model.model.fitted:
        targets = ", ".join(known.get("targets", [number_of(n_tasks, "target") + ", unnamed"]))
        facts["predicts"] = f"{targets} ({kind})"
    else:
        facts["predicts"] = "embeddings of formulas"
    if known.get("formulas"):
        facts["learned from"] = (
            f"{number_of(len(known['formulas']), 'reduced formula')}, kept in it"
        )
    elif isinstance(data, dict) and "rows" in data:
        source = data.get("structures") or data.get("labels")
        objective = known.get("objective", "not recorded")
        facts["learned from"] = f"{data['rows']:,} rows of {source}, objective {objective}"
    else:
        facts["learned from"] = str(data or "not recorded")
    told: dict[str, Any] = {"epochs": model.epochs_trained, "learning_rate": "not recorded"}
    told |= {**model.training, **known}
    facts["trained for"] = (
        f"{number_of(told['epochs'], 'epoch')} of {told['batch_size']} rows a step, learning rate "
        f"{told['learning_rate']}" + (f", recipe {told['recipe']}" if "recipe" in told else "")
    )
    encoders = number_of(settings["n_encoders"], "encoder")
    frozen = " that stay as they are" if settings["freeze_encoder"] else ""
    size = sum(parameter.numel() for parameter in model.model.parameters())
    members = "" if kind == "pretraining" else f"{number_of(settings['n_ensemble'], 'head')} on "
    facts["network"] = f"{members}{encoders} of formulas{frozen}, {size:,} parameters"
    facts["polymorphism"] = f"variance trained in {sum(model.variance_trained)} of {encoders}"
    if kind == "regression" and model.model.fitted:
        left = len(model.calibration.uncalibrated) if model.calibration else n_tasks
        some = f"but for {left} of {n_tasks} targets" if left else "on held-out labels"
        facts["std"] = f"calibrated {some}" if left < n_tasks else "not calibrated and too small"
        if model.calibration and model.calibration.needs_distance:
            facts["std"] += ", grows with the distance to what was learned from"
    return facts


def pretrain(options: argparse.Namespace) -> None:
    """Crystal structures -> a folder with a pretrained encoder."""
    dataset = read_structures(options.structures, options.on_error)
    model = PolySRLModel("pretraining", **_training(options))
    _save(fit_in(_unfinished(options), model, dataset, options.epochs), options.output_dir)
    shutil.rmtree(_unfinished(options), ignore_errors=True)


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


def _save(model: PolySRLModel, folder: str) -> None:
    replaced = (Path(folder) / MODEL_FILE).exists()
    model.save(folder)
    where = f"{folder}, in place of another" if replaced else folder
    print(f"model written to {where}", file=sys.stderr)


def _calibrate(
    model: PolySRLModel,
    held_out: dc.data.Dataset,
    predicted: HeldOut | None,
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
    print(f"std is calibrated on {' and '.join(map(str, counts))} held-out labels", file=sys.stderr)
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
