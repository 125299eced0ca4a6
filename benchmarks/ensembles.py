"""What averaging alone gains: the mean of recorded predictions, of models trained one by one.

    python benchmarks/ensembles.py --data-dir DATA

The fair comparison for an ensemble: the predictions of the transfer protocol that ``run_wetlab.py``
and ``compare.py`` have recorded for three seeds are averaged, and scored on the same folds. So are
those of ``recipes.py`` of three frozen and of the same three fine-tuned encoders. Nothing is
trained. Scores go to ``recipes.csv``, as those of one seed.
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

SEEDS = (0, 1, 2)
#: What is averaged: model, protocol and seeds.
MEANS: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {
    **{
        f"mean of three seeds, transfer, {model}": [(model, "transfer", SEEDS)]
        for model in ("rand_init", "polysrl", "roost")
    },
    "mean of frozen and fine-tuned": [("frozen", "recipe", (0,)), ("fine-tuned", "recipe", (0,))],
}


def mean_of_records(target: Target, name: str, output_dir: Path) -> np.ndarray:
    """Mean of the recorded predictions of one of :data:`MEANS`, (n,), in units of the target.

    Raises
    ------
    FileNotFoundError
        A seed is not recorded.
    InvalidInputError
        The seeds of a model were made by different settings.
    """
    parts = []
    for model, protocol, seeds in MEANS[name]:
        found = load_seeds(target, output_dir, model, protocol)
        for seed in seeds:
            if seed not in found:
                what = f"{model}, {protocol}, seed {seed}, {target.name}"
                raise FileNotFoundError(f"no record of {what}")
            parts.append(found[seed].predictions)
    return np.mean(parts, axis=0)


def main(argv: list[str] | None = None) -> None:
    """Average, score and print."""
    parser = runner_parser(__doc__)
    add = parser.add_argument
    add(
        "--means",
        nargs="+",
        choices=MEANS,
        default=list(MEANS),
        metavar="MEAN",
        help="; ".join(MEANS),
    )
    arguments = parser.parse_args(argv)
    place, parts = arguments.output_dir, []
    with refusing(parser):
        for target in wetlab_targets(find_data_dir(arguments.data_dir)):
            for name in arguments.means:
                about = (target.suite, "recipe", name, 0)
                predictions = mean_of_records(target, name, place)
                parts.append(prediction_scores(target, predictions, target.splits(), *about))
    scores = pd.concat(parts, ignore_index=True)
    merge_scores(place / "recipes.csv", scores)
    errors = scores[scores["metric"] == "mae"].pivot_table("value", "task", "model", sort=False)
    print(errors.round(3).to_markdown())


if __name__ == "__main__":
    main()
