"""What the variance of a formula's Gaussian means: Figures 4, 5 and 10 of the paper.

    python benchmarks/uncertainty.py --data-dir DATA --encoders before=runs/polysrl polysrl-mp

For each encoder: uncertainty against the number of known structures (Figure 4a), of pure and impure
thermoelectrics (4b), of named formulas beside their structures (5, F.6), and by the error of band
gaps (10a), each with the statistic of its trend. Writes ``uncertainty.csv``, where other encoders
stay as they are, ``uncertainty_cases.csv`` and figures; ``UNCERTAINTY.md`` quotes them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from command_line import refusing, runner_parser
from files import write_csv
from graph_data import graph_dataset
from paper_records import load_record
from polymorphs import (
    crystal_systems,
    distinct_structures,
    is_impure,
    structure_counts,
    structures_of,
)
from pretrain import split
from scipy.stats import mannwhitneyu, spearmanr
from scores import merge_rows
from targets import Target, wetlab_targets
from tasks import required_data_dir, structures_path
from uncertainty_figures import count_figure, group_figure, save

from polysrl_dc import PolymorphDataset, PolySRLModel
from polysrl_dc.stoichiometry import parse_formula

#: Formulas that Section 5.3 and Appendix F.6 of the paper discuss.
CASES = ("HgCl", "CaS", "ScN", "AgSO4", "ZrC", "NdF2", "NaI", "AlP")
THERMOELECTRICS = {"300 K": "estm300_seebeck", "600 K": "estm600_seebeck"}
#: Counts of structures that have a bar of their own; the last one stands for more, too.
MOST = 7


def uncertainties(model: PolySRLModel, formulas: list[str]) -> np.ndarray:
    """Geometric mean of the standard deviations (eq. 12) of each formula, shape (n,)."""
    return np.sqrt(model.predict_polymorphism(graph_dataset(formulas)))


def above(larger: np.ndarray, smaller: np.ndarray) -> dict[str, float]:
    """One-sided Mann-Whitney test that the first sample lies above the second.

    Returns
    -------
    dict
        ``n``, ``n_other``, ``statistic`` (chance that a value of the first exceeds one of the
        second), ``p``; ``mean`` and ``mean_other`` are those of the natural logarithm.

    Examples
    --------
    >>> above(np.array([2.0, 3.0]), np.array([1.0]))["statistic"]
    1.0
    """
    test = mannwhitneyu(larger, smaller, alternative="greater")
    return {
        "n": len(larger),
        "n_other": len(smaller),
        "statistic": float(test.statistic) / (len(larger) * len(smaller)),
        "p": float(test.pvalue),
        "mean": float(np.log(larger).mean()),
        "mean_other": float(np.log(smaller).mean()),
    }


def rising(counts: np.ndarray, sigma: np.ndarray) -> dict[str, float]:
    """Spearman's correlation of uncertainty and number of structures, one or more."""
    known = counts > 0
    test = spearmanr(counts[known], sigma[known])
    return {"n": int(known.sum()), "statistic": test.statistic, "p": test.pvalue}


def trends(
    model: PolySRLModel, known: pd.Series, held_out: np.ndarray, targets: dict[str, Target]
) -> pd.DataFrame:
    """Every trend of Figure 4 for an encoder: a row each, with its statistic.

    Parameters
    ----------
    model : PolySRLModel
    known : pandas.Series
        Formula of each known structure.
    held_out : numpy.ndarray
        Those formulas that the encoder has not been trained on.
    targets : dict
        By name.
    """
    formulas = list(targets["band_gap"].formulas)
    counts, sigma = structure_counts(formulas, known), uncertainties(model, formulas)
    sizes = np.array([len(parse_formula(formula)[0]) for formula in formulas])
    rows = {
        "band gap: rising with the number of structures": rising(counts, sigma),
        "band gap: several structures above one": above(sigma[counts > 1], sigma[counts == 1]),
        "band gap: no known structure above one": above(sigma[counts == 0], sigma[counts == 1]),
    }
    for size in (2, 3, 4):
        of_size = sizes == size
        rows[f"band gap: rising, {size} elements"] = rising(counts[of_size], sigma[of_size])
    unseen = structure_counts(held_out, known), uncertainties(model, list(held_out))
    rows["held-out stoichiometries: rising with the number of structures"] = rising(*unseen)
    for kelvin, name in THERMOELECTRICS.items():
        formulas = list(targets[name].formulas)
        sigma = uncertainties(model, formulas)
        impure = np.array([is_impure(formula) for formula in formulas])
        rows[f"ESTM {kelvin}: impure above pure"] = above(sigma[impure], sigma[~impure])
    return pd.DataFrame(rows).T.rename_axis("trend").reset_index()


def cases(model: PolySRLModel, path: Path, known: pd.Series, formulas: list[str]) -> pd.DataFrame:
    """The named formulas, and the most and least certain of ``formulas`` with three structures.

    Returns
    -------
    pandas.DataFrame
        Columns formula, chosen (why), structures, distinct (groups of ``StructureMatcher``),
        systems, sigma, percentile (among ``formulas``).
    """
    sigma = uncertainties(model, formulas)
    several = np.flatnonzero(structure_counts(formulas, known) >= 3)
    order = several[np.argsort(sigma[several])]
    chosen = dict.fromkeys(CASES, "named in the paper")
    chosen |= {formulas[i]: "most certain with 3 or more" for i in order[:5]}
    chosen |= {formulas[i]: "least certain with 3 or more" for i in order[:-6:-1]}
    rows = []
    for formula, why in chosen.items():
        structures = structures_of(path, formula)
        found = pd.Series(crystal_systems(structures), dtype=str).value_counts()
        value = float(uncertainties(model, [formula])[0])
        rows.append(
            {
                "formula": formula,
                "chosen": why,
                "structures": len(structures),
                "distinct": distinct_structures(structures),
                "systems": ", ".join(f"{system} {count}" for system, count in found.items()),
                "sigma": value,
                "percentile": 100 * float((sigma < value).mean()),
            }
        )
    return pd.DataFrame(rows)


def recorded_errors(target: Target, output_dir: Path) -> np.ndarray | None:
    """Absolute errors of the shipped encoder (representation, seed 0), (n,); None if not run."""
    record = load_record(output_dir, "wetlab", "polysrl", "representation", 0).get(target.name)
    return None if record is None else np.abs(record.predictions - target.values)


def by_error(sigma: np.ndarray, errors: np.ndarray) -> pd.DataFrame:
    """Trends of uncertainty with the error of the band gap, in eV: all, and great above small."""
    test = spearmanr(errors, sigma)
    great = errors >= 1
    rows = {
        "band gap: rising with the error": {
            "n": len(errors),
            "statistic": test.statistic,
            "p": float(test.pvalue),
        },
        "band gap: errors of 1 eV and more above the others": above(sigma[great], sigma[~great]),
    }
    return pd.DataFrame(rows).T.rename_axis("trend").reset_index()


def error_groups(sigma: np.ndarray, errors: np.ndarray) -> dict[str, np.ndarray]:
    """ln sigma by intervals of the error that are one unit wide, the last one open (Figure 10a).

    Examples
    --------
    >>> list(error_groups(np.ones(3), np.array([0.2, 1.5, 9.0])))
    ['0 to 1', '1 to 2', 'above 4']
    """
    group = np.minimum(errors.astype(int), 4)
    label = {number: f"{number} to {number + 1}" for number in range(4)} | {4: "above 4"}
    return {label[number]: np.log(sigma[group == number]) for number in np.unique(group)}


def main(argv: list[str] | None = None) -> None:
    """Measure, draw and print."""
    parser = runner_parser(__doc__, cache=True)
    add = parser.add_argument
    kinds = "saved pretraining models, each with a NAME= for the table; the last is drawn"
    add("--encoders", nargs="+", default=["polysrl-mp"], metavar="ENCODER", help=kinds)
    add("--hold-out", type=int, default=2000, help="as in the pretraining")
    add("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    with refusing(parser):
        data_dir = required_data_dir(arguments.data_dir)
        targets = {target.name: target for target in wetlab_targets(data_dir)}
    torch.set_num_threads(arguments.threads)
    path = Path(structures_path(None, data_dir))
    structures = PolymorphDataset(path, on_error="skip", cache_dir=arguments.cache_dir)
    held_out = np.unique(split(structures, arguments.hold_out, set(), 0)[1].formulas)
    known = pd.Series(structures.formulas)
    gap = targets["band_gap"]
    errors = recorded_errors(gap, arguments.output_dir)
    found = []
    for encoder in arguments.encoders:
        name, _, saved = encoder.rpartition("=")
        model = PolySRLModel.from_pretrained(saved)
        table = trends(model, known, held_out, targets)
        sigma = uncertainties(model, list(gap.formulas))
        if errors is not None:
            table = pd.concat([table, by_error(sigma, errors)], ignore_index=True)
        table.insert(0, "encoder", name or Path(saved).name)
        found.append(table)
        print(table.round(3).to_markdown(index=False))
    folder = arguments.output_dir
    merge_rows(folder / "uncertainty.csv", pd.concat(found), ["encoder", "trend"], digits=4)
    named = cases(model, path, known, list(gap.formulas))
    print(named.round(4).to_markdown(index=False))
    write_csv(folder / "uncertainty_cases.csv", named, digits=4)
    counts = np.minimum(structure_counts(gap.formulas, known), MOST)
    save(folder, "uncertainty_counts", count_figure(counts, sigma))
    if errors is not None:
        figure = group_figure(error_groups(sigma, errors))
        figure.axes[0].set_xlabel("absolute error of the band gap (eV)")
        save(folder, "uncertainty_errors", figure)
    groups = {}
    for kelvin, name in THERMOELECTRICS.items():
        formulas = list(targets[name].formulas)
        impure = np.array([is_impure(formula) for formula in formulas])
        sigma = np.log(uncertainties(model, formulas))
        groups[f"{kelvin}\npure"], groups[f"{kelvin}\nimpure"] = sigma[~impure], sigma[impure]
    save(folder, "uncertainty_impurity", group_figure(groups))


if __name__ == "__main__":
    main()
