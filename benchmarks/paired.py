"""A model beside another on the same folds, and beside the paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from targets import HELD_BACK, N_FOLDS, PARTS

PLACE = ["suite", "protocol", "metric", "task"]  # what a score is of, but for model, seed and fold
PAPER_COLUMNS = ["table", "protocol", "model", "dataset", "metric", "mean", "std"]
#: Of the intervals and of p.
LEVEL = 0.05
#: Part of the rows outside a fold that are trained on, where it is not all of them.
TRAINED_ON = {"paper": 1 - HELD_BACK, **{f"wetlab_{name}": part for name, part in PARTS.items()}}


def held_out_ratio(suite: str) -> float:
    """Test rows of a fold by its training rows.

    Examples
    --------
    >>> [round(held_out_ratio(suite), 3) for suite in ("wetlab", "paper", "wetlab_10%")]
    [0.25, 0.278, 2.5]
    """
    return 1 / (N_FOLDS - 1) / TRAINED_ON.get(suite, 1.0)


def over_folds(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean over the folds, after that over the seeds, of each column; its interval and its test.

    Folds share most of their training rows, so their scores are no independent samples. The
    variance of their mean is estimated as that of one fold times 1/n + test rows by training rows,
    instead of 1/n (Nadeau & Bengio, Machine Learning 52, 239, 2003).

    Parameters
    ----------
    scores : pandas.DataFrame
        Indexed by the columns of ``PLACE``, seed and fold; NaN where there is no score.

    Returns
    -------
    pandas.DataFrame
        ``mean``; ``half``, the half width of its 95 % t interval, and ``p``, of the t-test against
        zero, both NaN for fewer than two folds. Indexed by ``PLACE`` and the name of the column.

    Examples
    --------
    >>> place = ["wetlab", "transfer", "mae", "gap", 0]
    >>> names = [*PLACE, "seed", "fold"]
    >>> rows = pd.MultiIndex.from_tuples([(*place, fold) for fold in range(5)], names=names)
    >>> over_folds(pd.DataFrame({"a": [1.0, 2.0, 3.0, 2.0, 2.0]}, rows)).round(4).values.tolist()
    [[2.0, 1.317, 0.0135]]
    """
    folds = scores.groupby([*PLACE, "fold"]).mean().groupby(PLACE)
    mean, n = folds.mean(), folds.count()
    ratio = [held_out_ratio(suite) for suite in mean.index.get_level_values("suite")]
    error = folds.std() * np.sqrt((1 / n.replace(0, np.nan)).add(np.array(ratio, float), axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(mean / error)
    half, p = stats.t.ppf(1 - LEVEL / 2, n - 1) * error, 2 * stats.t.sf(t, n - 1)
    wide = {"mean": mean, "half": half, "p": pd.DataFrame(p, mean.index, mean.columns)}
    return pd.DataFrame({name: table.stack(future_stack=True) for name, table in wide.items()})


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Each p corrected for all of them by Holm's rule; NaN is no test and stays NaN.

    The k-th smallest of n is taken n - k + 1 times, and at least as large as the one before it
    (Holm, Scandinavian Journal of Statistics 6, 65, 1979).

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03, 0.005]).round(3).tolist()
    [0.03, 0.06, 0.06, 0.02]
    """
    values = np.asarray(p, float)
    order = np.argsort(values)  # NaN last
    times = np.maximum(np.isfinite(values).sum() - np.arange(len(values)), 1)
    corrected = np.empty_like(values)
    corrected[order] = np.maximum.accumulate(times * values[order]).clip(max=1)
    return corrected


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
        Columns mae, baseline, difference, half and p (of the difference, see :func:`over_folds`),
        pairs; reported units. Without a row where the two share no fold.
    """
    errors = scores[(scores["metric"] == "mae") & (scores["protocol"] == protocol)]
    errors = errors[(errors["suite"] == suite) & errors["model"].isin([model, baseline])]
    runs = errors.pivot_table("value", [*PLACE, "seed", "fold"], "model", sort=False)
    pairs = runs.reindex(columns=[model, baseline]).dropna().set_axis(["mae", "baseline"], axis=1)
    pairs["difference"] = pairs["mae"] - pairs["baseline"]
    found = over_folds(pairs).droplevel(PLACE[:-1]).unstack()
    columns = [*(("mean", name) for name in pairs), ("half", "difference"), ("p", "difference")]
    table = found.reindex(columns=columns).set_axis([*pairs, "half", "p"], axis=1)
    return table.assign(pairs=pairs.groupby("task").size())


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
    scores = scores[scores["task"].isin(targets)]
    for protocol in ("representation", "transfer"):
        table = paired_differences(scores, model, baseline, protocol, suite)
        if model == baseline or not len(table):
            errors = scores[(scores["model"] == model) & (scores["protocol"] == protocol)]
            errors = errors[(errors["metric"] == "mae") & (errors["suite"] == suite)]
            table = errors.groupby("task", sort=False)["value"].agg(["mean", "std", "count"])
        if not len(table):
            continue
        table = table.loc[[name for name in targets if name in table.index]]
        known = model if model in of_paper else "polysrl"
        if (paper := published(data_dir, protocol, known)) is not None:
            table = table.join(paper.rename(f"paper, {known}"))
        lines = [f"{model}, {protocol}", table.round(3).to_string()]
        if "difference" in table:
            better = int((table["difference"] < 0).sum())
            lines.append(f"{model} is better than {baseline} on {better} of {len(table)} targets")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)
