"""The options of the console command ``polysrl``."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from copy import copy
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from polysrl_dc.checkpoints import (
    DEFAULT_ENCODER,
    check_folder,
    checkpoint_path,
    shipped_encoders,
)
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.recalibration import half_width
from polysrl_dc.recipes import LEAST_ROWS, RECIPES, suitable_recipe
from polysrl_dc.tables import WRITERS

EXAMPLES = """
  polysrl embed Fe2O3 TiO2 ZnO
  polysrl embed --input alloys.csv --column composition --output embeddings.parquet
  polysrl train --input gaps.csv --target gap --folds 5 --output-dir gap_model
  polysrl predict --model gap_model GaN AlN
  polysrl predict --model gap_model --input new.csv --output predictions.csv
  polysrl retrieve TiO2 --structures structures.parquet -k 5
  polysrl domain Bi2Te3 Ag0.02Pb0.98Te --structures structures.parquet -k 1
  polysrl domain --input new.csv --model gap_model --output domain.csv
  polysrl info gap_model
  polysrl pretrain structures.parquet --epochs 20 --output-dir encoder
  polysrl pretrain cifs/*.cif --epochs 20 --output-dir encoder
"""
#: What the columns mean that a command writes beside those it was given.
COLUMNS = {
    "embed": """
  polymorphism   variance of the formula's Gaussian: rises, weakly, with the
                 number of its polymorphs; has no unit and is no error
  embedding_0 .. the vector of the formula, of length 1
""",
    "predict": f"""
  prediction     in the unit of the labels; of classes the probability of 1
  std            how far off it may be, in that unit: where it is calibrated,
                 the value is meant to lie within {half_width(0.95):.2f} std with 95 %
  lower, upper   with --interval: the bounds that this gives
  outside        True: unlike what the model has learned from, by an element
                 that none of it has or by its distance; errors are larger
                 there, and polysrl domain says why
  With several targets each but the last has the target in its name.
""",
    "retrieve": """
  rank               1: the likeliest, by what the database of the pretraining
                     holds, not by energy: metastable as high as stable ones
  structure          id or file of the candidate
  structure_formula  its own formula, which may be another one
  probability        that the formula has such a structure, for each candidate
                     by itself: they do not add up to 1
""",
    "domain": """
  outside        True: an element is unseen, or the nearest formula is further
                 than 99 % of the reference are from their own nearest one
  unseen         elements of the formula that the reference lacks
  percentile     how many % of the reference are closer to their own nearest one
  rank, nearest  1: the nearest formula of the reference, reduced
  distance       between the two vectors: 0 (same reduced formula) to 2
  n_structures, structures
                 how many rows of the reference have the nearest formula, and
                 their ids
""",
}
STRUCTURES = "a .parquet, a folder of them or of CIFs, aflow, files pymatgen reads, or JSON lists"
_DEFAULT = "; default: %(default)s"
Command = Callable[[argparse.Namespace], None]


def parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    """The parser; ``options.command`` is then the one of ``commands`` that is named.

    Parameters
    ----------
    commands : sequence of callable
        :func:`~polysrl_dc.cli.embed` and the others, which give their subcommands the names.

    Returns
    -------
    argparse.ArgumentParser
    """
    whole = argparse.ArgumentParser(
        prog="polysrl",
        description="Predict properties of materials from formulas alone.",
        epilog=f"examples:{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {version('polysrl-dc')}")
    by_name = {command.__name__: command for command in commands}
    subparsers = whole.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        examples = [line for line in EXAMPLES.splitlines() if line.split()[1:2] == [name]]
        columns = [f"columns written:{COLUMNS[name]}"] if name in COLUMNS else []
        sub = subparsers.add_parser(
            name,
            help=text,
            description=text,
            epilog="\n".join([*columns, "examples:", *examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=by_name[name])
        if name == "info":
            return sub
        sub.add_argument(
            "--on-error",
            choices=("raise", "skip"),
            default="raise",
            help="what a bad row (counted from 0, beneath the names) or structure does: end the "
            f"run, or be left out{_DEFAULT}",
        )
        return sub

    def add_table(sub: argparse.ArgumentParser, needed: bool = False) -> None:
        if not needed:
            sub.add_argument("formulas", nargs="*", help="formulas, instead of --input")
        told = "table: .csv, .tsv, .json, .jsonl or .parquet, also .gz; -: CSV on stdin"
        sub.add_argument("--input", required=needed, help=told)
        sub.add_argument(
            "--column",
            default="formula",
            help=f"its column of formulas, whose amounts are atoms, not weights{_DEFAULT}",
        )

    def add_encoder(sub: argparse.ArgumentParser, folder: str) -> None:
        text = f"{folder}, or name of a shipped encoder{_DEFAULT}"
        sub.add_argument("--model", default=DEFAULT_ENCODER, help=text)

    def add_output(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--output", type=_output, help=f"{', '.join(WRITERS)}; default: CSV on stdout"
        )

    def add_training(sub: argparse.ArgumentParser, **defaults: Any) -> None:
        """Without defaults they are those of the recipe."""
        default = _DEFAULT if defaults else "; default: that of the recipe"
        sub.add_argument("--epochs", type=_positive, help=f"passes over the data{default}")
        sub.add_argument("--batch-size", type=_positive, help=f"rows of a step{default}")
        sub.add_argument("--learning-rate", type=_rate, help=f"of AdamW, at its peak{default}")
        sub.set_defaults(**defaults)
        sub.add_argument("--seed", type=_natural, default=0, help=f"of all chance{_DEFAULT}")
        sub.add_argument("--output-dir", type=_folder, required=True, help="of the model")

    sub = add("embed", "Write the embedding of each formula and, if trained for, its polymorphism.")
    add_table(sub)
    add_encoder(sub, "folder of a model")
    add_output(sub)

    sub = add(
        "predict",
        "Write the prediction of a trained model, its standard deviation, and whether the formula "
        "lies outside of those that the model has learned from.",
    )
    add_table(sub)
    sub.add_argument("--model", required=True, help="folder that polysrl train has written")
    sub.add_argument(
        "--interval",
        type=_fraction,
        metavar="SHARE",
        help="also the bounds that are meant to hold this share of the values, as 0.95; needs a "
        "calibrated std",
    )
    sub.add_argument(
        "--no-outside",
        dest="outside",
        action="store_false",
        help="without the last of these, which takes time where the model has learned from many",
    )
    add_output(sub)

    sub = add("retrieve", "Rank candidate structures by the probability that a formula forms them.")
    add_table(sub)
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "help": STRUCTURES}
    sub.add_argument("--structures", required=True, **several)
    sub.add_argument(
        "-k", type=_positive, default=10, help=f"candidates of each, at most{_DEFAULT}"
    )
    sub.add_argument(
        "--same-proportions",
        action="store_true",
        help="those of the formula's proportions first, as GaN for NaCl: finds far more, where the "
        "formulas of the candidates are to be believed",
    )
    add_encoder(sub, "folder of polysrl pretrain")
    add_output(sub)

    sub = add("domain", "Say how far each formula is from those of a reference, and from which.")
    add_table(sub)
    known = sub.add_mutually_exclusive_group()
    known.add_argument("--structures", **several)
    known.add_argument(
        "--reference",
        help="instead, a table with the same column of formulas; rows are its names. Default: the "
        "formulas that polysrl train has kept in the model",
    )
    sub.add_argument(
        "--target",
        nargs="+",
        action="extend",
        help="columns of --reference; rows without a label in any of them are left out. Default: "
        "the targets of the model, where it has them",
    )
    sub.add_argument(
        "-k", type=_positive, default=5, help=f"formulas to name for each, at most{_DEFAULT}"
    )
    add_encoder(sub, "folder of a model")
    add_output(sub)

    sub = add("info", "Tell what a model is, what it has learned from and how.")
    sub.add_argument("models", nargs="*", help="folders or names; default: the shipped encoders")

    sub = add("train", "Train a model on formulas with measured or computed values.")
    add_table(sub, needed=True)
    sub.add_argument(
        "--target",
        nargs="+",
        action="extend",
        required=True,
        help="columns to predict: numbers without a unit; fields may be empty",
    )
    sub.add_argument(
        "--task",
        choices=("regression", "classification"),
        default="regression",
        help=f"classification: labels are 0 and 1, predictions the probability of 1{_DEFAULT}",
    )
    ways = "; ".join(f"{name}: {recipe.text}" for name, recipe in RECIPES.items())
    sizes = ", ".join(f"{name} from {least:,}" for name, least in LEAST_ROWS.items())
    sub.add_argument(
        "--recipe",
        nargs="+",
        choices=RECIPES,
        help=f"how to train, where the options below do not say it. {ways}. Default: by the number "
        f"of rows ({sizes} on); where one of the next three options is given, one encoder in the "
        "batches that suit. Of several, the one with the lowest error by --folds is kept",
    )
    sub.add_argument(
        "--pretrained",
        nargs="+",
        action="extend",
        help="encoders to start from, a member each: "
        f"{', '.join(shipped_encoders())}, folder of polysrl pretrain, or none",
    )
    sub.add_argument("--freeze-encoder", action="store_true", help="train the head only")
    sub.add_argument("--ensemble", type=_positive, help="members, a multiple of the encoders")
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
        "--group",
        metavar="COLUMN",
        help="rows with the same field here, e.g. a DOI, stay in one part of either",
    )
    sub.add_argument(
        "--predictions", type=_output, help="table of the rows scored on, with prediction and std"
    )
    add_training(sub)

    sub = add("pretrain", "Pretrain an encoder on crystal structures.")
    sub.add_argument("structures", nargs="+", help=STRUCTURES)
    add_training(sub, epochs=20, batch_size=256, learning_rate=1e-3)
    return whole


def check(options: argparse.Namespace) -> None:
    """Refuse options that need others, and to write over what is read.

    Raises
    ------
    InvalidInputError
        Names the option.
    """
    for name in ("predictions", "group"):
        if getattr(options, name, None) is not None and not (options.folds or options.hold_out):
            raise InvalidInputError(f"--{name} needs --folds or --hold-out")
    if len(getattr(options, "recipe", None) or []) > 1 and not options.folds:
        raise InvalidInputError("--recipe with several names needs --folds, which choose")
    if options.name == "domain" and options.target and not options.reference:
        raise InvalidInputError("--target needs --reference")
    read = [getattr(options, name, None) for name in ("input", "reference")]
    for name in ("output", "predictions"):
        path = getattr(options, name, None)
        for source in read:
            if path and source and os.path.realpath(path) == os.path.realpath(source):
                raise InvalidInputError(f"--{name} {path} is the table that is read")
        for source in getattr(options, "structures", None) or []:
            if path and _holds(source, path):
                raise InvalidInputError(f"--{name} {path} is among the structures that are read")
    check_folder(getattr(options, "output_dir", ""))
    for encoder in getattr(options, "pretrained", None) or []:
        folder = checkpoint_path(encoder).parent
        if encoder != "none" and os.path.realpath(folder) == os.path.realpath(options.output_dir):
            raise InvalidInputError(
                f"--output-dir {options.output_dir} holds the encoder {encoder}"
            )


def _holds(source: str, path: str) -> bool:
    """Whether a file is a source of structures, or would be read in a folder that is one."""
    folder, file = (Path(os.path.realpath(name)) for name in (source, path))
    return file == folder or (file.suffix == ".parquet" and folder in file.parents)


def follow_recipes(options: argparse.Namespace, n_rows: int) -> list[argparse.Namespace]:
    """Options by each recipe that is named, or the one that suits the rows, where none is given."""
    suitable, ways = suitable_recipe(n_rows), []
    if not options.recipe and (options.pretrained or options.freeze_encoder or options.ensemble):
        suitable = suitable if suitable == "large" else "single"  # how, but not in what batches
        options.pretrained = options.pretrained or [DEFAULT_ENCODER]
    for name in dict.fromkeys(options.recipe or [suitable]):
        ways.append(way := copy(options))
        recipe, way.recipe = RECIPES[name], name
        for setting, value in {"epochs": recipe.epochs, **recipe.settings}.items():
            setattr(way, setting, getattr(way, setting) or value)
        way.pretrained = list(way.pretrained or [DEFAULT_ENCODER])
        what = "heads" if way.freeze_encoder else "encoders and heads"
        print(
            f"recipe {name}: {what} on {', '.join(way.pretrained)}, {way.epochs} epochs, "
            f"{way.batch_size} rows a step, learning rate {way.learning_rate:g}",
            file=sys.stderr,
        )
    return ways


def _output(path: str) -> str:
    if not path.endswith(tuple(WRITERS)):
        raise argparse.ArgumentTypeError(f"{path} does not end in one of {', '.join(WRITERS)}")
    if not Path(path).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path} lies in no folder that exists")
    if Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    return _writable(path, Path(path).absolute().parent)


def _folder(path: str) -> str:
    if not path:
        raise argparse.ArgumentTypeError("no folder is named")
    there = next(part for part in [Path(path), *Path(path).absolute().parents] if part.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: {there} is a file, no folder")
    return _writable(path, there)


def _writable(path: str, folder: Path) -> str:
    try:
        with TemporaryFile(dir=folder):  # what fails now would fail after hours of training
            return path
    except OSError as error:  # which names that file
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror or error}") from error


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below 1")
    return value


def _rate(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not an integer from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)
