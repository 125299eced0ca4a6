"""Seconds that a fold of the tables costs: PolySRL, Roost, CrabNet and Magpie with a random forest.

    python benchmarks/compare.py --cost --data-dir DATA --output-dir RESULTS

``--speed`` compares formulas per second in equal batches; this, what the scores beside each other
have cost. Each model learns the first training fold and predicts its test rows exactly as for the
tables, with its own batches and epochs: PolySRL by the transfer protocol, its rate chosen among
four (as the first seed does) or given (as the others take it), and by the recipe ``frozen``, three
encoders. Time is that of the processor, on one thread, so what else the machine does counts little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import recipes
import torch
import transfer
from command_line import chosen_targets, refusing, runner_parser
from files import write_csv
from magpie import predict_baseline
from peers import PEERS, lacking, peer_model, predict_peer_fold
from targets import Target, wetlab_targets
from tasks import find_data_dir
from tqdm import tqdm

from polysrl_dc.checkpoints import DEFAULT_ENCODER

Split = tuple[np.ndarray, np.ndarray]
COLUMNS = ["model", "target", "formulas", "seconds"]


def forest(target: Target, split: Split, seed: int) -> np.ndarray:
    """Train a random forest on Magpie features, and predict."""
    found = predict_baseline("magpie_forest", [target], [seed], lambda _: [split])
    return found[target.name][0, split[1]]


_transfer = partial(transfer.predict_fold, encoder=DEFAULT_ENCODER)
#: Target, split and seed -> anything.
WAYS: dict[str, Callable[..., Any]] = {
    "polysrl, rate chosen": _transfer,
    "polysrl, rate given": partial(_transfer, learning_rates=transfer.LEARNING_RATES[:1]),
    "three encoders": partial(recipes.predict_fold, recipe=recipes.RECOMMENDED),
    **{name: partial(predict_peer_fold, name=name) for name in PEERS},
    "magpie_forest": forest,
}


def measure(targets: Sequence[Target], names: Sequence[str], seed: int) -> pd.DataFrame:
    """Seconds of the first fold of each target by each model.

    Parameters
    ----------
    targets : sequence of Target
    names : sequence of str
        Of :data:`WAYS`.
    seed : int

    Returns
    -------
    pandas.DataFrame
        Columns model, target, formulas (learned from), seconds (of one processor).
    """
    for name in set(names) & set(PEERS):
        peer_model(name)  # whose import is not its training
    rows = []
    todo = [(target, name) for target in targets for name in names]
    for target, name in (bar := tqdm(todo, unit="fold")):
        bar.set_description(f"{name}, {target.name}")
        split = target.splits()[0]
        start = time.process_time()
        WAYS[name](target, split, seed=seed)
        rows.append([name, target.name, len(split[0]), time.process_time() - start])
    return pd.DataFrame(rows, columns=COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write ``compare_cost.csv``, print the table."""
    parser = runner_parser(__doc__, prog="compare.py --cost")
    add, names = parser.add_argument, tuple(WAYS)
    add("--models", nargs="+", choices=names, default=names, metavar="MODEL", help="; ".join(names))
    add("--targets", nargs="+", metavar="TARGET", help="default: the smallest and the largest")
    add("--seed", type=int, default=0)
    add("--dry-run", action="store_true", help="read the data; time and write nothing")
    arguments = parser.parse_args(argv)
    for name in arguments.models:
        if name in PEERS and (line := lacking(name)):
            parser.error(line)
    with refusing(parser):
        known = sorted(
            wetlab_targets(find_data_dir(arguments.data_dir)), key=lambda t: len(t.values)
        )
    asked = arguments.targets or [known[0].name, known[-1].name]
    targets = chosen_targets(parser, known, asked)
    print(", ".join(f"{target.name}: {len(target.splits()[0][0])} formulas" for target in targets))
    if arguments.dry_run:
        print("DRY RUN: nothing is timed and nothing is written")
        return 0
    torch.set_num_threads(1)
    table = measure(targets, arguments.models, arguments.seed)
    path = arguments.output_dir / "compare_cost.csv"
    write_csv(path, table.assign(threads=1, torch=torch.__version__, seed=arguments.seed))
    shown = table.pivot(index="model", columns="target", values="seconds")
    shown = shown.loc[list(arguments.models), [target.name for target in targets]]
    print(shown.to_string(float_format="{:,.1f}".format))
    print(f"written to {path}")
    return 0
