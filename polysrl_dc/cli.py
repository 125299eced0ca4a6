"""The console command ``polysrl``: embed, train, predict, retrieve, domain and pretrain."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepchem as dc
import numpy as np
import pandas as pd
from tqdm import tqdm

from polysrl_dc.checkpoints import DEFAULT_ENCODER, shipped_encoders
from polysrl_dc.cross_validation import cross_val_predict
from polysrl_dc.datasets import PolymorphDataset, StoichiometrySplitter, drop_skipped
from polysrl_dc.domain import Domain, OutsideDomainWarning
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import StoichiometryGraphFeaturizer, StructureGraphFeaturizer
from polysrl_dc.metrics import masked_scores
from polysrl_dc.model import PolySRLModel
from polysrl_dc.sources import read_structure
from polysrl_dc.tables import WRITERS, check_names, numbers, read_table, write_table

EXAMPLES = """
examples:
  polysrl embed Fe2O3 TiO2 ZnO
  polysrl embed --input alloys.csv --column composition --output embeddings.parquet
  polysrl train --input gaps.csv --target gap --folds 5 --output-dir gap_model
  polysrl predict --model gap_model GaN AlN
  polysrl predict --model gap_model --input new.csv --output predictions.csv
  polysrl retrieve TiO2 --structures structures.parquet -k 5
  polysrl domain Bi2Te3 Ag0.02Pb0.98Te --structures structures.parquet -k 1
  polysrl domain --input new.csv --reference gaps.csv --model gap_model --output domain.csv
  polysrl pretrain structures.parquet --epochs 20 --output-dir encoder
  polysrl pretrain cifs/*.cif --epochs 20 --output-dir encoder
"""
STRUCTURES = "a .parquet table, a folder of them or of CIF files, aflow, or files pymatgen reads"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``polysrl``.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line without the program's name; ``sys.argv`` by default.

    Returns
    -------
    int
        Exit status: 0, or 2 after a one-line message on standard error.

    Examples
    --------
    >>> main(["embed"])
    2
    """
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
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
    frame, dataset = _formulas(options, options.target)
    held_out, predicted = None, None
    if options.predictions:
        if not (options.folds or options.hold_out):
            raise InvalidInputError("--predictions needs --folds or --hold-out")
        check_names(frame, _columns(len(options.target)))
    if options.folds:
        held_out = dataset
        each = partial(_trained, options)
        predicted = cross_val_predict(each, dataset, options.folds, seed=options.seed)
    elif options.hold_out:
        dataset, held_out = StoichiometrySplitter().train_test_split(
            dataset, frac_train=1 - options.hold_out, seed=options.seed
        )
        if not (len(dataset) and len(held_out)):
            raise InvalidInputError(
                f"--hold-out {options.hold_out} leaves {len(dataset)} rows to train on and "
                f"{len(held_out)} to score on"
            )
    model = _trained(options, dataset)
    if held_out is not None and options.task == "regression":
        _calibrate(model, held_out, predicted)
    model.save(options.output_dir)
    print(f"model written to {options.output_dir}", file=sys.stderr)
    if held_out is not None:
        mean, std = predicted or model.predict_uncertainty(held_out)
        if predicted and model.calibration:
            std = model.calibration.apply(std)
        score = dc.metrics.mae_score if options.task == "regression" else dc.metrics.roc_auc_score
        metric = dc.metrics.Metric(score, np.mean)
        for name, value in masked_scores(held_out.y, mean, held_out.w, [metric])[0].items():
            print(f"{name} on {len(held_out)} held-out rows: {value:.4g}", file=sys.stderr)
        if options.predictions:
            write_table(frame.loc[held_out.ids], _predictions(mean, std), options.predictions)


def predict(options: argparse.Namespace) -> None:
    """Formulas -> columns ``prediction`` and ``std``, numbered where there are several targets."""
    model = PolySRLModel.from_pretrained(options.model)
    frame, dataset = _formulas(options)
    write_table(frame, _predictions(*model.predict_uncertainty(dataset)), options.output)


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
    options: argparse.Namespace, targets: Sequence[str] = ()
) -> tuple[pd.DataFrame, dc.data.Dataset]:
    """The table of formulas, as given or read, and its dataset; the rows of both correspond."""
    given = getattr(options, "formulas", [])
    if bool(given) == bool(options.input):
        raise InvalidInputError("give either formulas or --input FILE")
    if options.input:
        frame = read_table(options.input, [options.column, *targets])
    else:
        frame = pd.DataFrame({options.column: given})
    graphs = StoichiometryGraphFeaturizer(options.on_error).featurize(frame[options.column])
    rows = frame.index.to_numpy()
    if targets:
        labels = np.column_stack([numbers(frame[name]) for name in targets])
        weights = (~np.isnan(labels)).astype(float)
        dataset = dc.data.NumpyDataset(graphs, np.where(weights, labels, 0.0), weights, rows)
    else:
        dataset = dc.data.NumpyDataset(graphs, ids=rows)
    dataset = drop_skipped(dataset)
    if len(dataset) == 0:
        raise InvalidInputError("no usable formula is left")
    return frame.loc[dataset.ids].copy(), dataset


def _structures(paths: Sequence[str], on_error: str) -> dc.data.Dataset:
    """Structure graphs of one source of PolymorphDataset, or of files of one structure each."""
    if len(paths) == 1:
        return PolymorphDataset(paths[0], on_error=on_error)
    structures = np.empty(len(paths), dtype=object)
    for i, path in enumerate(tqdm(paths, unit="file", disable=None)):
        try:
            structures[i] = read_structure(path)
        except InvalidInputError as error:
            structures[i] = str(error)
            if on_error == "raise":
                raise InvalidInputError(f"{path}: {error}") from error
    graphs = StructureGraphFeaturizer(on_error=on_error).featurize(pd.Series(structures, paths))
    return drop_skipped(dc.data.NumpyDataset(graphs, ids=np.array(paths, dtype=object)))


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
) -> None:
    try:
        model.calibrate(held_out, predicted=predicted)
        print(f"std is calibrated on {len(held_out)} held-out rows", file=sys.stderr)
    except InvalidInputError as error:
        print(f"std is not calibrated: {error}", file=sys.stderr)


def _predictions(mean: np.ndarray, std: np.ndarray) -> pd.DataFrame:
    """Columns ``prediction`` and ``std``, numbered where there are several targets."""
    return pd.DataFrame(np.hstack([mean, std]), columns=_columns(mean.shape[1]))


def _columns(n_tasks: int) -> list[str]:
    tasks = [f"_{task}" for task in range(n_tasks)] if n_tasks > 1 else [""]
    return [name + task for name in ("prediction", "std") for task in tasks]


def _output(path: str) -> str:
    if not path.endswith(tuple(WRITERS)):
        raise argparse.ArgumentTypeError(f"{path} does not end in one of {', '.join(WRITERS)}")
    if not Path(path).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path} lies in no folder that exists")
    return path


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polysrl",
        description="Predict properties of materials from formulas alone.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(command.__name__, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument(
            "--on-error", choices=("raise", "skip"), default="raise", help="what a bad row does"
        )
        return sub

    def add_table(sub: argparse.ArgumentParser, needed: bool = False) -> None:
        if not needed:
            sub.add_argument("formulas", nargs="*", help="formulas, instead of --input")
        sub.add_argument("--input", required=needed, help="table: .csv, .json or .parquet")
        sub.add_argument("--column", default="formula", help="its column of formulas")

    def add_training(sub: argparse.ArgumentParser, epochs: int, batch_size: int) -> None:
        sub.add_argument("--epochs", type=_positive, default=epochs)
        sub.add_argument("--batch-size", type=_positive, default=batch_size)
        sub.add_argument("--learning-rate", type=float, default=1e-3)
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--output-dir", required=True, help="folder the model is written to")

    sub = add(embed, "Write the embedding of each formula and its polymorphism uncertainty.")
    add_table(sub)
    sub.add_argument(
        "--model", default=DEFAULT_ENCODER, help="folder of a model, or name of a shipped encoder"
    )
    sub.add_argument("--output", type=_output, help=".csv, .csv.gz or .parquet; else CSV to stdout")

    sub = add(predict, "Write the prediction of a trained model and its standard deviation.")
    add_table(sub)
    sub.add_argument("--model", required=True, help="folder that polysrl train has written")
    sub.add_argument("--output", type=_output, help=".csv, .csv.gz or .parquet; else CSV to stdout")

    sub = add(retrieve, "Rank candidate structures by the probability that a formula forms them.")
    add_table(sub)
    sub.add_argument("--structures", nargs="+", required=True, help=STRUCTURES)
    sub.add_argument("-k", type=_positive, default=10, help="candidates to write for each formula")
    sub.add_argument(
        "--model", default=DEFAULT_ENCODER, help="folder of polysrl pretrain, or shipped encoder"
    )
    sub.add_argument("--output", type=_output, help=".csv, .csv.gz or .parquet; else CSV to stdout")

    sub = add(domain, "Say how far each formula is from those of a reference, and from which.")
    add_table(sub)
    known = sub.add_mutually_exclusive_group(required=True)
    known.add_argument("--structures", nargs="+", help=STRUCTURES)
    known.add_argument("--reference", help="instead, a table with the same column of formulas")
    sub.add_argument("-k", type=_positive, default=5, help="reference formulas to name for each")
    sub.add_argument(
        "--model", default=DEFAULT_ENCODER, help="folder of a model, or name of a shipped encoder"
    )
    sub.add_argument("--output", type=_output, help=".csv, .csv.gz or .parquet; else CSV to stdout")

    sub = add(train, "Train a model on formulas with measured or computed values.")
    add_table(sub, needed=True)
    sub.add_argument("--target", nargs="+", required=True, help="columns to predict; gaps are fine")
    sub.add_argument("--task", choices=("regression", "classification"), default="regression")
    sub.add_argument(
        "--pretrained",
        nargs="+",
        default=[DEFAULT_ENCODER],
        help=f"{', '.join(shipped_encoders())}, folder of polysrl pretrain, or none; a member each",
    )
    sub.add_argument("--freeze-encoder", action="store_true", help="train the head only")
    sub.add_argument("--ensemble", type=_positive, help="models to average, a multiple of these")
    kept = sub.add_mutually_exclusive_group()
    kept.add_argument(
        "--hold-out", type=_fraction, default=0.0, help="part kept to score and calibrate on"
    )
    kept.add_argument(
        "--folds",
        type=_positive,
        help="score and calibrate by cross-validation in so many parts, and train on all rows",
    )
    sub.add_argument(
        "--predictions", type=_output, help="table of the rows scored on, with prediction and std"
    )
    add_training(sub, 100, 32)

    sub = add(pretrain, "Pretrain an encoder on crystal structures.")
    sub.add_argument("structures", nargs="+", help=STRUCTURES)
    add_training(sub, 20, 256)
    return parser
