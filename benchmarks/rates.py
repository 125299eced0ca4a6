"""Learning rates that the transfer protocol chose, out of the records of its runs.

The paper chooses among four rates by the error on a fifth of the training rows (Appendix E), which
are thirty rows of the smallest target. Seed 0 chooses; further seeds train at its rates.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from claims import SHORT, WETLAB
from paper_models import MODELS
from paper_records import load_record
from transfer import LEARNING_RATES

COLUMNS = ["model", "task", "fold", "rate", "margin"]
#: The rates are shown as multiples of the smallest.
UNIT = min(LEARNING_RATES)


def chosen_rates(output_dir: str | Path) -> pd.DataFrame:
    """What was chosen on each fold of each wet-lab target, and by how much.

    Parameters
    ----------
    output_dir : path
        Folder of the records ``wetlab_v0.1/MODEL_transfer_seed0``.

    Returns
    -------
    pandas.DataFrame
        Columns ``model``, ``task``, ``fold``, ``rate`` and ``margin``: the validation error of the
        second best rate over that of the chosen one, minus 1. Nothing of a rate that was given.

    Examples
    --------
    >>> chosen_rates("benchmarks/encoders").columns.tolist()
    ['model', 'task', 'fold', 'rate', 'margin']
    """
    rows = []
    for model in MODELS:
        records = load_record(output_dir, "wetlab", model, "transfer", 0)
        for task in WETLAB:
            for fold, params in enumerate(records[task].params if task in records else []):
                if errors := sorted(params.get("validation_mae", {}).values()):
                    margin = errors[1] / errors[0] - 1
                    rows.append((model, task, fold, params["learning_rate"], margin))
    return pd.DataFrame(rows, columns=COLUMNS)


def rate_cells(chosen: pd.DataFrame) -> pd.DataFrame:
    """Texts by model and target: rates of the five folds, and the median margin in per cent."""
    groups = chosen.groupby(["model", "task"], sort=False)
    rates = groups["rate"].agg(lambda found: " ".join(f"{rate / UNIT:g}" for rate in found))
    margins = groups["margin"].median().map(lambda margin: f"{100 * margin:.1f} %")
    texts = (rates + "<br>" + margins).unstack("task")
    return texts.reindex(
        index=[model for model in MODELS if model in texts.index],
        columns=[task for task in WETLAB if task in texts.columns],
    ).rename(columns=SHORT)
