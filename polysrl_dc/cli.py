"""The console command ``polysrl``: embed, train, predict, retrieve, domain and pretrain."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import deepchem as dc
import numpy as np
import pandas as pd
from tqdm import tqdm

from polysrl_dc.checkpoints import DEFAULT_ENCODER, shipped_encoders
from polysrl_dc.datasets import PolymorphDataset, StoichiometrySplitter, drop_skipped
from polysrl_dc.domain import Domain, OutsideDomainWarning
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import StoichiometryGraphFeaturizer, StructureGraphFeaturizer
from polysrl_dc.model import PolySRLModel
from polysrl_dc.sources import read_structure, unpacked

EXAMPLES = """
examples:
  polysrl embed Fe2O3 TiO2 ZnO
  polysrl embed --input alloys.csv --column composition --output embeddings.parquet
  polysrl train --input gaps.csv --target gap --epochs 100 --hold-out 0.2 --output-dir gap_model
  polysrl predict --model gap_model GaN AlN
  polysrl predict --model gap_model --input new.csv --output predictions.csv
  polysrl retrieve TiO2 --structures structures.parquet -k 5
  polysrl domain Bi2Te3 Ag0.02Pb0.98Te --structures structures.parquet -k 1
  polysrl domain --input new.csv --reference gaps.csv --model gap_model --output domain.csv
  polysrl pretrain structures.parquet --epochs 20 --output-dir encoder
  polysrl pretrain cifs/*.cif --epochs 20 --output-dir encoder
"""
STRUCTURES = "a .parquet table, a folder of them or of CIF files, aflow, or files pymatgen reads"
_LARGEST_TABLE = 2**30  # bytes of a table, unpacked
WRITERS: dict[str, Callable[[pd.DataFrame, Any], Any]] = {
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".csv.gz": lambda frame, path: frame.to_csv(path, index=False),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
}


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
    _write(frame, embedding, options.output)


def train(options: argparse.Namespace) -> None:
    """Formulas and labels -> a model folder, and its score on held-out formulas."""
    _, dataset = _formulas(options, options.target)
    test = None
    if options.hold_out:
        dataset, test = StoichiometrySplitter().train_test_split(
            dataset, frac_train=1 - options.hold_out, seed=options.seed
        )
        if not (len(dataset) and len(test)):
            raise InvalidInputError(
                f"--hold-out {options.hold_out} leaves {len(dataset)} rows to train on and "
                f"{len(test)} to score on"
            )
    model = PolySRLModel(
        options.task,
        len(options.target),
        pretrained=[None if name == "none" else name for name in options.pretrained],
        freeze_encoder=options.freeze_encoder,
        n_ensemble=options.ensemble,
        **_training(options),
    )
    _fit(model, dataset, options.epochs)
    if test is not None and options.task == "regression":
        _calibrate(model, test)
    model.save(options.output_dir)
    print(f"model written to {options.output_dir}", file=sys.stderr)
    if test is not None:
        score = dc.metrics.mae_score if options.task == "regression" else dc.metrics.roc_auc_score
        metric = dc.metrics.Metric(score, np.mean)
        for name, value in model.evaluate(test, [metric]).items():
            print(f"{name} on {len(test)} held-out rows: {value:.4g}", file=sys.stderr)


def predict(options: argparse.Namespace) -> None:
    """Formulas -> columns ``prediction`` and ``std``, numbered where there are several targets."""
    model = PolySRLModel.from_pretrained(options.model)
    frame, dataset = _formulas(options)
    columns = {}
    for name, values in zip(("prediction", "std"), model.predict_uncertainty(dataset), strict=True):
        for task in range(values.shape[1]):
            suffix = f"_{task}" if values.shape[1] > 1 else ""
            columns[name + suffix] = values[:, task]
    _write(frame, pd.DataFrame(columns), options.output)


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
    _write(frame.loc[frame.index.repeat(k)], pd.DataFrame(found), options.output)


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
    _write(frame.loc[frame.index.repeat(k)], found, options.output)
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
        frame = _read(options.input, [options.column, *targets])
    else:
        frame = pd.DataFrame({options.column: given})
    graphs = StoichiometryGraphFeaturizer(options.on_error).featurize(frame[options.column])
    rows = frame.index.to_numpy()
    if targets:
        labels = np.column_stack([_numbers(frame[name]) for name in targets])
        weights = (~np.isnan(labels)).astype(float)
        dataset = dc.data.NumpyDataset(graphs, np.where(weights, labels, 0.0), weights, rows)
    else:
        dataset = dc.data.NumpyDataset(graphs, ids=rows)
    dataset = drop_skipped(dataset)
    if len(dataset) == 0:
        raise InvalidInputError("no usable formula is left")
    return frame.loc[dataset.ids].copy(), dataset


def _read(path: str, columns: Sequence[str]) -> pd.DataFrame:
    """A CSV, JSON or Parquet table with ``columns``; the first of them is read as text.

    Rows are numbered from 0. The name of an index becomes that of a column.
    """
    content = unpacked(path, _LARGEST_TABLE)
    try:
        frame = _parsed(path, content, columns[0])
    except Exception as error:  # three parsers, each of which fails in its own ways
        raise InvalidInputError(f"{path} is no table: {error}") from error
    frame = frame.reset_index(drop=frame.index.names == [None])
    missing = [name for name in columns if name not in frame]
    if missing:
        raise InvalidInputError(f"{path} has no column {missing[0]!r}, only {list(frame.columns)}")
    if frame.empty:
        raise InvalidInputError(f"{path} has no row")
    return frame


def _parsed(path: str, content: bytes, text: str) -> pd.DataFrame:
    """The table in a file whose column ``text`` is one of text."""
    if path.endswith(".parquet"):
        return pd.read_parquet(BytesIO(content))
    if path.endswith(".json"):
        return pd.read_json(BytesIO(content), dtype={text: str}, convert_dates=False)
    if b"\0" in content:  # where pandas would end the field
        raise ValueError("it holds a byte that is zero, no text in UTF-8")
    # a converter keeps pandas from reading the formula NaN as a missing value
    frame = pd.read_csv(BytesIO(content), converters={text: str})
    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError("rows have more fields than the first line has names")
    return frame


def _numbers(column: pd.Series) -> np.ndarray:
    """Labels as floats, NaN where there is none."""
    numbers = pd.to_numeric(column.astype(object), errors="coerce")  # a date is no number
    bad = numbers.isna() & column.notna()
    if bad.any():
        row = bad.idxmax()
        raise InvalidInputError(f"row {row}: {column.name} is {column[row]!r}, not a number")
    return numbers.to_numpy(dtype=float)


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


def _fit(model: PolySRLModel, dataset: dc.data.Dataset, epochs: int) -> None:
    steps = epochs * -(-len(dataset) // model.batch_size)
    with tqdm(total=steps, unit="step", disable=None) as bar:
        model.fit(dataset, nb_epoch=epochs, callbacks=[lambda model, step: bar.update()])


def _calibrate(model: PolySRLModel, test: dc.data.Dataset) -> None:
    try:
        model.calibrate(test)
        print(f"std is calibrated on {len(test)} held-out rows", file=sys.stderr)
    except InvalidInputError as error:
        print(f"std is not calibrated: {error}", file=sys.stderr)


def _write(given: pd.DataFrame, found: pd.DataFrame, path: str | None) -> None:
    """Write the rows of a table as they were given, and what was found, beside one another."""
    taken = [name for name in found if name in given]
    if taken:
        raise InvalidInputError(f"the table has a column {taken[0]!r} already; rename it")
    frame = pd.concat([given.reset_index(drop=True), found], axis=1)
    if path is None:
        WRITERS[".csv"](frame, sys.stdout)
        return
    writer = next(writer for suffix, writer in WRITERS.items() if path.endswith(suffix))
    writer(frame, path)
    print(f"{len(frame)} rows written to {path}", file=sys.stderr)


def _output(path: str) -> str:
    if not path.endswith(tuple(WRITERS)):
        raise argparse.ArgumentTypeError(f"{path} does not end in one of {', '.join(WRITERS)}")
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
    sub.add_argument(
        "--hold-out", type=_fraction, default=0.0, help="part kept to score and calibrate on"
    )
    add_training(sub, 100, 32)

    sub = add(pretrain, "Pretrain an encoder on crystal structures.")
    sub.add_argument("structures", nargs="+", help=STRUCTURES)
    add_training(sub, 20, 256)
    return parser
