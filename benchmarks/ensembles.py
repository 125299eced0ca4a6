"""What averaging alone gains: the mean of three seeds, of models that were trained one by one.

    python benchmarks/ensembles.py --data-dir DATA

The fair comparison for an ensemble: the predictions of the transfer protocol that ``run_wetlab.py``
and ``compare.py`` have recorded for three seeds are averaged, and scored on the same folds. Nothing
is trained. Scores go to ``recipes.csv``, as those of one seed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from command_line import refusing, runner_parser
from paper_records import load_seeds, prediction_scores
from scores import merge_scores
from targets import Target, wetlab_targets
from tasks import find_data_dir

MODELS = ("rand_init", "polysrl", "roost")
SEEDS = (0, 1, 2)


def mean_of_seeds(target: Target, model: str, output_dir: Path) -> np.ndarray:
    """Mean of the recorded predictions of the transfer protocol, (n,), in units of the target.

    Raises
    ------
    FileNotFoundError
        A seed is not recorded.
    InvalidInputError
        The seeds were made by different settings.
    """
    found = load_seeds(target, output_dir, model, "transfer")
    for seed in SEEDS:
        if seed not in found:
            raise FileNotFoundError(f"no record of {model}, transfer, seed {seed}, {target.name}")
    return np.mean([record.predictions for record in found.values()], axis=0)


def main(argv: list[str] | None = None) -> None:
    """Average, score and print."""
    parser = runner_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=MODELS, metavar="MODEL", help="with records of three seeds")
    arguments = parser.parse_args(argv)
    place, parts = arguments.output_dir, []
    with refusing(parser):
        for target in wetlab_targets(find_data_dir(arguments.data_dir)):
            for model in arguments.models:
                about = (target.suite, "recipe", f"mean of three seeds, transfer, {model}", 0)
                predictions = mean_of_seeds(target, model, place)
                parts.append(prediction_scores(target, predictions, target.splits(), *about))
    scores = pd.concat(parts, ignore_index=True)
    merge_scores(place / "recipes.csv", scores)
    errors = scores[scores["metric"] == "mae"].pivot_table("value", "task", "model", sort=False)
    print(errors.round(3).to_markdown())


if __name__ == "__main__":
    main()
