"""A model beside another on the same folds, and beside the paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

PAIR = ["task", "seed", "fold"]
PAPER_COLUMNS = ["table", "protocol", "model", "dataset", "metric", "mean", "std"]


def paired_differences(
    scores: pd.DataFrame,
    model: str,
    baseline: str,
    protocol: str = "representation",
    suite: str = "wetlab",
) -> pd.DataFrame:
    """Mean absolute errors of two models on the same seeds and folds, by target.

    Returns
    -------
    pandas.DataFrame
        Columns mae, baseline, difference, standard_error (of the difference, over the pairs),
        pairs; reported units. Without a row where the two share no fold.
    """
    errors = scores[(scores["metric"] == "mae") & (scores["protocol"] == protocol)]
    errors = errors[errors["suite"] == suite]
    ours, theirs = (
        errors[errors["model"] == name].set_index(PAIR)["value"] for name in (model, baseline)
    )
    pairs = pd.DataFrame({"mae": ours, "baseline": theirs}).dropna()
    pairs["difference"] = pairs["mae"] - pairs["baseline"]
    by_task = pairs.groupby("task", sort=False)
    table = by_task.mean()
    table["standard_error"] = by_task["difference"].sem()
    table["pairs"] = by_task.size()
    return table


def read_paper(data_dir: Path | None) -> pd.DataFrame:
    """Means and standard deviations of the paper if its tables lie beside the data, else no row."""
    path = None if data_dir is None else data_dir / ".." / "paper" / "tables.csv"
    found = path is not None and path.is_file()
    return pd.read_csv(path) if found else pd.DataFrame(columns=PAPER_COLUMNS)


def published(data_dir: Path | None, protocol: str, model: str = "polysrl") -> pd.Series | None:
    """MAE by target of a model in the paper, if its tables lie beside the data.

    Tables 1, 6 and 7 for the representation protocol, 8 (which repeats 2) for transfer.
    """
    table = read_paper(data_dir)
    chosen = table[(table["protocol"] == protocol) & (table["model"] == model)]
    chosen = chosen[(chosen["metric"] == "mae") & chosen["table"].isin([1, 6, 7, 8])]
    return chosen.set_index("dataset")["mean"].rename("paper") if len(chosen) else None


def comparison(
    scores: pd.DataFrame,
    model: str,
    baseline: str,
    suite: str,
    targets: Sequence[str],
    data_dir: Path | None,
    of_paper: Sequence[str],
) -> str:
    """MAE of a model by target and protocol beside a baseline's and the paper's, as text.

    Parameters
    ----------
    scores : pandas.DataFrame
        All scores.
    model, baseline, suite : str
    targets : sequence of str
        Names, in the order of the lines.
    data_dir : path or None
        Beside which the paper's tables lie.
    of_paper : sequence of str
        Models that the paper has; others stand beside its ``polysrl``.
    """
    tables = []
    for protocol in ("representation", "transfer"):
        table = paired_differences(scores, model, baseline, protocol, suite)
        if model == baseline or not len(table):
            errors = scores[(scores["model"] == model) & (scores["protocol"] == protocol)]
            errors = errors[(errors["metric"] == "mae") & (errors["suite"] == suite)]
            table = errors.groupby("task", sort=False)["value"].agg(["mean", "std", "count"])
        if not len(table):
            continue
        table = table.reindex([name for name in targets if name in table.index])
        known = model if model in of_paper else "polysrl"
        if (paper := published(data_dir, protocol, known)) is not None:
            table = table.join(paper.rename(f"paper, {known}"))
        lines = [f"{model}, {protocol}", table.round(3).to_string()]
        if "difference" in table:
            better = int((table["difference"] < 0).sum())
            lines.append(f"{model} is better than {baseline} on {better} of {len(table)} targets")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)
