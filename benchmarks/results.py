"""Scores as the cells of tables: means, intervals, paired differences, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from claims import MATBENCH, SHORT, SUPERVISED, WETLAB, ZT, Numbers
from labels import MP_PROPERTIES
from magpie import BASELINES
from paired import PLACE, over_folds
from paper_models import MODELS
from paper_protocol import PROTOCOLS, suite_name
from peers import LONGER, PEERS
from scores import COLUMNS, COMPOSITION_MODELS
from targets import N_FOLDS, PARTS, SMALL_TASKS

FILES = (
    *("wetlab_scores.csv", "thermoelectrics.csv", "paper_scores.csv"),
    *("recipes.csv", "recipe_sizes.csv", "crabnet_scores.csv", "scores.csv"),
)
N_SEEDS = 3
NOT_RUN = "not run"
TIMES = "\N{MULTIPLICATION SIGN}"

ALL = (*MODELS, *BASELINES)
Key = tuple[str, str, str, str, str]
"""Suite, protocol, metric, task, model."""


@dataclass(frozen=True)
class Cell:
    """Mean of a score over the folds, after that over the seeds, and its paired comparison.

    ``half`` and ``difference_half`` are half widths of 95 % intervals, NaN for a single fold. Not
    ``fair`` is a model that was pretrained on the very labels it is scored on.
    """

    mean: float
    half: float
    seeds: int
    folds: int
    difference: float = np.nan
    difference_half: float = np.nan
    p: float = np.nan
    fair: bool = True

    @property
    def size(self) -> str:
        """Seeds times folds of a run that has too few of them, else nothing."""
        complete = self.seeds >= N_SEEDS and self.folds >= N_FOLDS
        return "" if complete else f"{self.seeds}{TIMES}{self.folds}"


Cells = dict[Key, Cell]


def ordered(models: Iterable[str]) -> list[str]:
    """Models in the order of the paper's tables, then others by name."""
    given = set(models)
    known = (*MODELS, *PEERS, *BASELINES)
    return [model for model in known if model in given] + sorted(given - set(known))


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes
    ----------
    name, title : str
    sources : tuple of int
        Tables of the paper, in its file ``tables.csv``, with the values beside ours.
    suite, protocol, metric : str
        Of the results in it.
    tasks : sequence of str
        Its columns.
    models : sequence of str
        They have a row and are named as missing even if they have not been run.
    others : bool
        Other models that have been run have a row as well.
    """

    name: str
    title: str
    sources: tuple[int, ...]
    suite: str
    protocol: str
    metric: str
    tasks: Sequence[str]
    models: Sequence[str]
    others: bool = True

    def row(self, cells: Cells, model: str) -> list[Cell | None]:
        """The cells of a model, None where it has not been run."""
        key = (self.suite, self.protocol, self.metric)
        return [cells.get((*key, task, model)) for task in self.tasks]

    def rows(self, cells: Cells) -> dict[str, list[Cell | None]]:
        """The cells of all models, those of the paper first."""
        models = set(self.models)
        if self.others:
            where = (self.suite, self.protocol, self.metric)
            models |= {key[4] for key in cells if key[:3] == where and key[3] in self.tasks}
        return {model: self.row(cells, model) for model in ordered(models)}

    def published(self, paper: pd.DataFrame) -> pd.DataFrame:
        """The paper's values by model and target: columns mean and std."""
        rows = paper[paper["table"].isin(self.sources)]
        return rows.set_index(["model", "dataset"])[["mean", "std"]]


NINE = tuple(WETLAB)
TABLES = (
    Table("Table 1", "wet lab", (1, 7), "wetlab", "representation", "mae", (*NINE, *ZT), ALL),
    Table("Table 2", "wet lab", (8,), "wetlab", "transfer", "mae", NINE, MODELS),
    Table("Table 4", "wet lab", (4,), "wetlab", "representation", "r2", NINE, ALL),
    Table("Table 5", "wet lab", (5,), "wetlab", "transfer", "r2", NINE, MODELS),
    Table("Table 6", "Matbench", (6,), "paper", "representation", "mae", tuple(MATBENCH), ALL),
    Table(
        "Table 7",
        "ablation on the wet lab",
        (1, 7),
        "wetlab",
        "representation",
        "mae",
        NINE,
        ("infomax3d", "without_sampling", "polysrl"),
        others=False,
    ),
)


COMPARED = ("rand_init", "polysrl", *PEERS, "magpie_forest")
#: Beside models that have no encoder of ours; see :func:`compared`.
TABLE_8 = Table(
    "Table 8",
    "wet lab, beside published models",
    (8,),
    "wetlab",
    "transfer",
    "mae",
    NINE,
    COMPARED,
    others=False,
)
MATBENCH_8 = replace(
    TABLE_8,
    name="Not in the paper",
    title="Matbench, beside published models",
    sources=(),
    suite="paper",
    tasks=SMALL_TASKS,
    models=tuple(name for name in COMPARED if name not in LONGER),  # these sets are not small
)


def _extra(title: str, suite: str, protocol: str, tasks: Sequence[str]) -> Table:
    return Table("Not in the paper", title, (), suite, protocol, "mae", tasks, ())


#: The record of ``run_matbench.py``, and those of others that see no structure.
OFFICIAL = replace(
    _extra("Matbench, official folds", "matbench", "finetune", (*MATBENCH, "matbench_expt_gap")),
    models=("PolySRL",),
)
MATBENCH_TRANSFER = _extra("Matbench", "paper", "transfer", tuple(MATBENCH))
ZT_TABLES = {name: _extra("ZT", "wetlab", name, tuple(ZT)) for name in PROTOCOLS}
GROUPED = _extra(
    "wet lab in grouped folds", suite_name("wetlab", "grouped"), "representation", NINE
)
PUBLICATIONS = tuple(
    replace(
        _extra(
            "ESTM in folds by publication",
            suite_name("wetlab", "publication"),
            "representation",
            tuple(name for name in NINE if name.startswith("estm")),
        ),
        metric=metric,
    )
    for metric in ("mae", "r2")
)
RECIPES = _extra("wet lab, ways to train", "wetlab", "recipe", NINE)
MATBENCH_RECIPES = _extra("Matbench, ways to train", "paper", "recipe", SMALL_TASKS)
#: Learning curves, by part of the training rows, ascending.
CURVES = {
    part.replace("%", " %"): _extra(
        f"wet lab, {part.replace('%', ' %')} of the training rows", suite, "representation", NINE
    )
    for part, suite in (
        *((part, suite_name("wetlab", part)) for part in PARTS),
        ("100%", "wetlab"),
    )
}


def read_scores(output_dir: Path) -> pd.DataFrame:
    """The tables of scores that exist, one after the other, with the column ``file``.

    Raises
    ------
    ValueError
        A file lacks a column, naming both.
    """
    tables = []
    for name in FILES:
        if (output_dir / name).is_file():
            table = pd.read_csv(output_dir / name)
            lacking = [column for column in COLUMNS if column not in table]
            if lacking:
                raise ValueError(f"{output_dir / name} has no column {lacking[0]!r}")
            tables.append(table.dropna(subset="value").assign(file=name))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def records_beside(scores: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Scores of Matbench's official folds, with those of the composition models' records.

    Parameters
    ----------
    scores : pandas.DataFrame
        Of :func:`read_scores`.
    published : pandas.DataFrame
        Of :func:`scores.leaderboard`.
    """
    own = scores[(scores["suite"] == OFFICIAL.suite) & (scores["protocol"] == OFFICIAL.protocol)]
    theirs = published[published["algorithm"].isin(COMPOSITION_MODELS)]
    theirs = theirs.rename(columns={"algorithm": "model"})
    theirs = theirs.assign(suite=OFFICIAL.suite, protocol=OFFICIAL.protocol, seed=0)
    both = [part[COLUMNS] for part in (own, theirs) if len(part)]
    return pd.concat(both, ignore_index=True) if len(own) else own


def compared(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores of :data:`COMPARED` in the transfer protocol.

    Those of Magpie, which has no encoder to train, stand under representation; its folds are the
    same.
    """
    scores = scores[scores["model"].isin(COMPARED)]
    magpie = scores["model"].isin(BASELINES) & (scores["protocol"] == "representation")
    transfer = scores["protocol"] == "transfer"
    return pd.concat([scores[transfer], scores[magpie].assign(protocol="transfer")])


def cells_of(scores: pd.DataFrame, baseline: str) -> Cells:
    """Every mean with its interval and its difference to the baseline.

    Seeds repeat the same folds, so they are averaged first, and n is the number of folds. Pairs are
    the seeds and folds that both models have; their t-test is that of the folds' mean differences
    against zero, see :func:`paired.over_folds`.
    """
    runs = scores.pivot_table("value", [*PLACE, "seed", "fold"], "model")
    pairs = runs.sub(runs[baseline] if baseline in runs else np.nan, axis=0)
    pairs = pairs.drop(columns=baseline, errors="ignore")
    by_seed = runs.groupby([*PLACE, "seed"]).count().replace(0, np.nan).groupby(PLACE)
    sizes = {"seeds": by_seed.count(), "folds": by_seed.min()}
    table = over_folds(runs).drop(columns="p").dropna(subset="mean")
    names = {"mean": "difference", "half": "difference_half"}
    table = table.join(over_folds(pairs).rename(columns=names))
    table = table.assign(**{name: size.stack() for name, size in sizes.items()})
    table = table.astype({"seeds": int, "folds": int})
    tasks, models = (table.index.get_level_values(name) for name in ("task", "model"))
    table["fair"] = [MP_PROPERTIES.get(m) != t for m, t in zip(models, tasks, strict=True)]
    return {
        key: Cell(**cell) for key, cell in zip(table.index, table.to_dict("records"), strict=True)
    }


def numbers_of(cells: Cells, paper: pd.DataFrame) -> tuple[Numbers, Numbers]:
    """Errors by table, ours and the paper's; those of peers are the paper's where not run.

    Ours are NaN where they are not fair.
    """
    ours, theirs = {}, {}
    rows = [*MODELS, *SUPERVISED]
    for table in TABLES:
        own = _means(cells, table).reindex(rows)
        other = table.published(paper)["mean"].astype(float).unstack()
        other = other.reindex(index=rows, columns=list(table.tasks))
        own.loc[list(SUPERVISED)] = own.loc[list(SUPERVISED)].fillna(other)
        higher = table.metric == "r2"
        ours[table.name], theirs[table.name] = (1 - own, 1 - other) if higher else (own, other)
    found = Table("", "", (), "wetlab", "representation", "f1", tuple(ZT), MODELS)
    ours["screening"] = 1 - _means(cells, found).reindex(rows)
    theirs["screening"] = ours["screening"] * np.nan
    return ours, theirs


def shortfall(cells: Cells, table: Table) -> str:
    """What a table lacks of three seeds and five folds, by model; empty if it is complete."""
    groups: dict[str, list[str]] = {}
    for model in table.rows(cells):
        states: dict[str, list[str]] = {}
        for task in table.tasks:
            keys = [(table.suite, table.protocol, name, task, model) for name in ("mae", "r2")]
            run = [cells[key].size for key in keys if key in cells]
            state = min(filter(None, run), default="") if len(run) == 2 else NOT_RUN
            states.setdefault(state, []).append(SHORT[task])
        states.pop("", None)
        parts = [
            state if len(tasks) == len(table.tasks) else f"{state} for {', '.join(tasks)}"
            for state, tasks in states.items()
        ]
        if parts:
            groups.setdefault("; ".join(parts), []).append(model)
    if groups.get(NOT_RUN, []) == list(table.rows(cells)):
        return NOT_RUN
    named = {state: [f"*{m}*" if "," in m else m for m in group] for state, group in groups.items()}
    return " | ".join(f"{', '.join(models)}: {state}" for state, models in named.items())


def best_of(rows: Sequence[Sequence[Cell | None]], metric: str) -> list[float]:
    """The best fair mean of each column, least for MAE and else largest; NaN without any."""
    table = pd.DataFrame([list(map(_fair_mean, row)) for row in rows])
    return list(table.min() if metric == "mae" else table.max())


def reached(cells: Cells, paper: pd.DataFrame, table: Table, tasks: Sequence[str]) -> str:
    """On how many targets polysrl is at or below the paper's, at the three digits of its tables.

    The random start's count stands beside it: folds and data differ from the paper's as well.
    """
    theirs = table.published(paper)["mean"]
    own, start = (
        dict(zip(table.tasks, table.row(cells, model), strict=True))
        for model in ("polysrl", "rand_init")
    )
    groups: dict[str, list[str]] = {"at or below": [], "above": [], NOT_RUN: []}
    started = 0
    for task in tasks:
        cell, other, value = own[task], start[task], theirs.get(("polysrl", task), np.nan)
        started += other is not None and round(other.mean, 3) <= value
        if cell is None or np.isnan(value):
            groups[NOT_RUN].append(SHORT[task])
        else:
            word = "at or below" if round(cell.mean, 3) <= value else "above"
            groups[word].append(f"{SHORT[task]} {cell.mean:.3f} ({value:.3f})")
    title = f"{table.name}, {table.protocol}, {len(tasks)} targets"
    if len(groups[NOT_RUN]) == len(tasks):
        return f"{title}: {NOT_RUN}"
    details = [f"{word}: {', '.join(names)}" for word, names in groups.items() if names]
    count = f"{len(groups['at or below'])} of {len(tasks)} (the random start {started})"
    return f"{title}: {count}; {'; '.join(details)}"


def _means(cells: Cells, table: Table) -> pd.DataFrame:
    rows = {
        model: list(map(_fair_mean, table.row(cells, model))) for model in (*MODELS, *SUPERVISED)
    }
    return pd.DataFrame.from_dict(rows, "index", dtype=float, columns=list(table.tasks))


def _fair_mean(cell: Cell | None) -> float:
    return cell.mean if cell and cell.fair else np.nan
