"""Formulas per second of PolySRL, Roost, CrabNet and Magpie with a random forest, in one run.

    python benchmarks/compare.py --speed --data-dir DATA --output-dir RESULTS

All learn from the same formulas, those with a band gap in the wet lab, in batches of 128, and take
turns, so that whatever else the machine does slows all. Training: whole steps of each model's own
``fit``, batches included, from one step of the optimizer to the next, after some that do not count;
PolySRL trains encoder and head as in the transfer protocol. The forest is fitted as a whole, to
features that are there. Prediction: ``predict`` of graphs (the forest: features), and of formulas.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from command_line import refusing, runner_parser
from files import write_csv
from graph_data import Dataset, dataset_of
from magpie import magpie_features, regressor
from peers import PEERS, lacking, peer_model
from targets import Target, wetlab_targets
from tasks import find_data_dir
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm
from transfer import CONFIG

from polysrl_dc import PolySRLModel

BATCH_SIZE = 128
WARM_UP = 3
COLUMNS = ["model", "parameters", "training", "prediction", "from_formulas"]
REFERENCE = "roost"


class _Enough(Exception):
    """Ends a training whose steps have been timed."""


@dataclass(frozen=True)
class Contender:
    """What is timed of a model.

    Attributes
    ----------
    read : callable
        Target -> inputs of all its formulas: a dataset of graphs, or features.
    train : callable
        Inputs -> anything.
    predict : callable
        Inputs -> anything, by a model that has been fitted to a few formulas.
    parameters : int
        Trainable weights; nodes of the forest.
    learns_in_steps : bool
        Whether ``train`` takes steps of an optimizer, which are timed.
    """

    read: Callable[[Target], Any]
    train: Callable[[Any], Any]
    predict: Callable[[Any], Any]
    parameters: int
    learns_in_steps: bool = True


def step_seconds(train: Callable[[], Any], n: int) -> list[float]:
    """Seconds of ``n`` steps of a training after :data:`WARM_UP` others, then it is broken off.

    Each lasts from the end of one step of an optimizer to the end of the next.
    """
    times: list[float] = []
    owner: list[Any] = []

    def note(optimizer: Any, *_: Any) -> None:
        owner.append(optimizer)
        if optimizer is owner[0]:  # and not one around it
            times.append(time.perf_counter())
        if len(times) == WARM_UP + n:
            raise _Enough

    handle = register_optimizer_step_post_hook(note)
    try:
        train()
    except _Enough:
        return list(np.diff(times[WARM_UP - 1 :]))
    finally:
        handle.remove()
    raise ValueError(f"the training ended after {len(times)} steps of {WARM_UP + n}")


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def polysrl(target: Target, seed: int) -> Contender:
    """PolySRL as the transfer protocol trains it, from the shipped encoder."""

    def train(dataset: Dataset) -> PolySRLModel:
        model = PolySRLModel(
            "regression",
            config=CONFIG,
            batch_size=BATCH_SIZE,
            schedule="constant",
            seed=seed,
            device="cpu",
        )
        model.fit(dataset, nb_epoch=1, checkpoint_interval=0)
        return model

    fitted = train(read_graphs(part_of(target, BATCH_SIZE)))
    weights = [p for p in fitted.model.parameters() if p.requires_grad]
    return Contender(read_graphs, train, fitted.predict, sum(p.numel() for p in weights))


def peer(name: str, target: Target, seed: int) -> Contender:
    """Roost or CrabNet with its published settings; epochs do not change its steps."""
    short = {"roost": 1, "crabnet": 20}[name]
    few = read_graphs(part_of(target, BATCH_SIZE))

    def train(dataset: Dataset) -> Any:
        given = {"valid": few} if name == "crabnet" else {}  # else it would learn from a part only
        return peer_model(name, seed, epochs=short, device="cpu").fit(dataset, **given)

    fitted = train(few)
    return Contender(read_graphs, train, fitted.predict, fitted.n_parameters)


def forest(target: Target, seed: int) -> Contender:
    """A random forest of Magpie features."""

    def train(features: np.ndarray) -> Any:
        return regressor("magpie_forest", seed).fit(features, target.values)

    fitted = train(read_features(target))
    nodes = sum(tree.tree_.node_count for tree in fitted.estimators_)
    return Contender(read_features, train, fitted.predict, nodes, learns_in_steps=False)


def read_graphs(target: Target) -> Dataset:
    """Graphs and values of all rows of a target."""
    return dataset_of(target, np.arange(len(target.values)))


def read_features(target: Target) -> np.ndarray:
    """Magpie features of all rows of a target."""
    return magpie_features(list(target.formulas))


def part_of(target: Target, n: int) -> Target:
    """The first rows of a target."""
    return replace(target, formulas=target.formulas[:n], values=target.values[:n])


CONTENDERS: dict[str, Callable[[Target, int], Contender]] = {
    "polysrl": polysrl,
    "roost": partial(peer, "roost"),
    "crabnet": partial(peer, "crabnet"),
    "magpie_forest": forest,
}


def measure(
    target: Target, names: Sequence[str], turns: int, steps: int, seed: int
) -> pd.DataFrame:
    """Formulas per second of each model, the models taking turns.

    Parameters
    ----------
    target : Target
        As many rows as fill the batches of an epoch, which has steps enough.
    names : sequence of str
        Of :data:`CONTENDERS`.
    turns, steps : int
        Medians are taken over the turns, of training over the steps of all turns.
    seed : int

    Returns
    -------
    pandas.DataFrame
        Columns model, parameters; formulas/s: training, prediction, from_formulas.
    """
    sides = {name: CONTENDERS[name](target, seed) for name in names}
    inputs = {name: side.read(target) for name, side in sides.items()}
    n = len(target.values)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)

    for _ in tqdm(range(turns), unit="turn"):
        for name, side in sides.items():
            train = partial(side.train, inputs[name])
            steps_or_fit = step_seconds(train, steps) if side.learns_in_steps else [timed(train)]
            seconds[name, "training"] += steps_or_fit
            seconds[name, "prediction"].append(timed(partial(side.predict, inputs[name])))
            read = timed(partial(side.read, target))
            seconds[name, "from_formulas"].append(read + seconds[name, "prediction"][-1])
    rows = []
    for name, side in sides.items():
        sizes = {"training": BATCH_SIZE if side.learns_in_steps else n}
        rates = [
            sizes.get(stage, n) / statistics.median(seconds[name, stage]) for stage in COLUMNS[2:]
        ]
        rows.append([name, side.parameters, *rates])
    return pd.DataFrame(rows, columns=COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write ``compare_speed.csv``, print the table."""
    parser = runner_parser(__doc__, prog="compare.py --speed")
    add = parser.add_argument
    names = tuple(CONTENDERS)
    add("--models", nargs="+", choices=names, default=names, metavar="MODEL", help=", ".join(names))
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="default: torch's own choice")
    add("--turns", type=int, default=5)
    add("--steps", type=int, default=15, help="timed in each turn of training")
    add("--dry-run", action="store_true", help="read the data; time and write nothing")
    arguments = parser.parse_args(argv)
    if min(arguments.turns, arguments.steps, arguments.threads or 1) < 1:
        parser.error("--turns, --steps and --threads must be at least 1")
    for name in arguments.models:
        if name in PEERS and (line := lacking(name)):
            parser.error(line)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with refusing(parser):
        target = wetlab_targets(find_data_dir(arguments.data_dir))[0]
    batches = len(target.values) // BATCH_SIZE
    if arguments.steps > batches - WARM_UP:
        parser.error(f"--steps is {arguments.steps}: must be at most {batches - WARM_UP}")
    target = part_of(target, batches * BATCH_SIZE)  # full batches only
    facts = {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "target": target.name,
        "formulas": len(target.values),
        "batch_size": BATCH_SIZE,
        "turns": arguments.turns,
        "steps": arguments.steps,
        "seed": arguments.seed,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if arguments.dry_run:
        print("DRY RUN: nothing is timed and nothing is written")
        return 0
    table = measure(target, arguments.models, arguments.turns, arguments.steps, arguments.seed)
    path = arguments.output_dir / "compare_speed.csv"
    write_csv(path, table.assign(**facts))
    print(table.to_string(index=False, float_format="{:,.0f}".format))
    rates = table.set_index("model")
    if {"polysrl", REFERENCE} <= set(rates.index):
        ratio = rates.loc["polysrl", COLUMNS[2:]] / rates.loc[REFERENCE, COLUMNS[2:]]
        said = ", ".join(f"{stage} {value:.1f}" for stage, value in ratio.items())
        print(f"polysrl is faster than {REFERENCE} by the factors {said}")
    print(f"written to {path}")
    return 0
