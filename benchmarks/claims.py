"""What the paper concludes from its Tables 1 to 8 and Figure 8, as comparisons of mean errors.

A claim is checked item by item, an item being mostly a target, on any set of tables: on ours for
the verdict, and on the paper's own for comparison.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from labels import MP_PROPERTIES
from tasks import PAPER_TASKS

PROPERTIES = {
    "electrical_conductivity": "\N{GREEK SMALL LETTER SIGMA}",
    "thermal_conductivity": "\N{GREEK SMALL LETTER KAPPA}",
    "seebeck": "S",
}
#: Short names of the targets: the nine of the wet lab, ZT, and the seven of Matbench.
WETLAB = {"band_gap": "gap", "formation_enthalpy": "form.", "metallic": "glass"} | {
    f"estm{kelvin}_{name}": f"{sign}{kelvin}"
    for kelvin in (300, 600)
    for name, sign in PROPERTIES.items()
}
ZT = {"estm300_zt": "ZT300", "estm600_zt": "ZT600"}
MATBENCH = {name: name.removeprefix("matbench_") for name in PAPER_TASKS}
SHORT = WETLAB | ZT | MATBENCH | {"matbench_expt_gap": "expt_gap"}

UNSTRUCTURED = ("rand_init", "graphcl", "mp_band_gap", "mp_formation_energy")
STRUCTURED = ("infomax3d", "polysrl")
#: The six models of all the paper's tables, and the two of Table 8 that have no encoder of ours.
PAPER_MODELS = (*UNSTRUCTURED, *STRUCTURED)
BASELINES = PAPER_MODELS[:-1]
SUPERVISED = ("roost", "crabnet")

#: Mean errors, a row per model and a column per target, by table: MAE,
#: 1 - R² (Tables 4 and 5) or 1 - F1 ("screening").
Numbers = Mapping[str, pd.DataFrame]

NOT_JUDGED = "not judged"
RULES = {
    "all": "on every item",
    "most": "on more than half of the items",
    "paper": "on at least as many items as in the paper's own numbers",
    "some": "on at least one item",
}


@dataclass(frozen=True)
class Claim:
    """A conclusion of the paper.

    Attributes
    ----------
    where, text : str
    rule : str
        How many items must agree, one of :data:`RULES`.
    check : callable
        Numbers -> Series of True, False or, where a number is missing, NaN, by item.
    """

    where: str
    text: str
    rule: str
    check: Callable[[Numbers], pd.Series]


def better(errors: pd.DataFrame, model: str, others: Sequence[str]) -> pd.Series:
    """By column, whether a model's error is below those of all others; NaN where one is missing.

    Examples
    --------
    >>> errors = pd.DataFrame({"gap": [0.4, 0.5], "glass": [0.2, np.nan]}, index=["a", "b"])
    >>> better(errors, "a", ["b"]).tolist()
    [True, nan]
    """
    mine, rest = errors.reindex([model]).iloc[0], errors.reindex(others).min(skipna=False)
    return (mine < rest).astype(object).where(mine.notna() & rest.notna())


def best(errors: pd.DataFrame, model: str, among: Sequence[str] = PAPER_MODELS) -> pd.Series:
    """By column, whether a model's error is below those of all others of a list."""
    return better(errors, model, [name for name in among if name != model])


def structure_helps(errors: pd.DataFrame) -> pd.Series:
    """By column, whether models that saw structures have the lower mean error."""
    groups = [errors.reindex(names).mean(skipna=False) for names in (STRUCTURED, UNSTRUCTURED)]
    return better(pd.DataFrame(groups, index=["with", "without"]), "with", ["without"])


def own_gain_is_largest(errors: pd.DataFrame, model: str, own: str) -> pd.Series:
    """By other column, whether the model gains less over the random start than on its own one."""
    ratio = (errors.loc[model] / errors.loc["rand_init"]).rename("other")
    table = pd.DataFrame([ratio, pd.Series(ratio[own], index=ratio.index, name="own")])
    return better(table.drop(columns=own), "own", ["other"])


def misleading_pairs(errors: pd.DataFrame) -> pd.Series:
    """By ZT, whether a model is at or below another on all three properties but above it on ZT."""
    found: dict[str, Any] = {}
    for task in ZT:
        columns = [task.replace("zt", name) for name in PROPERTIES]
        rows = errors.reindex(PAPER_MODELS)[[*columns, task]]
        pairs = [(rows.loc[a], rows.loc[b]) for a in rows.index for b in rows.index]
        found[task] = any((a[columns] <= b[columns]).all() and a[task] > b[task] for a, b in pairs)
        if rows.isna().any(axis=None):
            found[task] = np.nan
    return pd.Series(found, dtype=object)


def each_against_random(errors: pd.DataFrame) -> pd.Series:
    """By baseline and column, whether pretraining has made the error larger."""
    parts = {name: better(errors, "rand_init", [name]) for name in BASELINES[1:]}
    return pd.concat(parts)


def transfer_helps(numbers: Numbers) -> pd.Series:
    """By model and target, whether training the encoder too has made the error smaller."""
    errors = {"frozen": numbers["Table 1"], "trained": numbers["Table 2"]}
    parts = {
        name: table.reindex(PAPER_MODELS)[list(WETLAB)].stack(future_stack=True)
        for name, table in errors.items()
    }
    return better(pd.DataFrame(parts).T, "trained", ["frozen"])


def _wetlab(numbers: Numbers) -> pd.DataFrame:
    return numbers["Table 1"][list(WETLAB)]


def _zt(numbers: Numbers) -> pd.DataFrame:
    return numbers["Table 1"][list(ZT)]


def _transfer(numbers: Numbers) -> pd.DataFrame:
    return numbers["Table 2"][list(WETLAB)]


def _fair(numbers: Numbers) -> pd.DataFrame:
    """Table 6 without the tasks on whose labels a model was pretrained."""
    return numbers["Table 6"].drop(columns=list(MP_PROPERTIES.values()))


def _own_property_is_not_enough(numbers: Numbers) -> pd.Series:
    """By property, whether the model trained on its DFT labels is not the best on it."""
    parts = [best(numbers["Table 6"][[task]], model) for model, task in MP_PROPERTIES.items()]
    return pd.concat(parts).map(operator.not_, na_action="ignore")


CLAIMS = (
    Claim(
        "Table 1",
        "Structural information helps: mean error of infomax3d and polysrl below that of the "
        "four models without it.",
        "most",
        lambda n: structure_helps(_wetlab(n)),
    ),
    Claim(
        "Table 1",
        "PolySRL beats the random start.",
        "all",
        lambda n: better(_wetlab(n), "polysrl", ["rand_init"]),
    ),
    Claim(
        "Table 1",
        "PolySRL beats 3D Infomax, which overlooks polymorphism.",
        "all",
        lambda n: better(_wetlab(n), "polysrl", ["infomax3d"]),
    ),
    Claim(
        "Table 1",
        "PolySRL is the best of the six models.",
        "paper",
        lambda n: best(_wetlab(n), "polysrl"),
    ),
    Claim(
        "Table 1",
        "Pretraining on DFT band gaps is the best of the six models for measured band gaps.",
        "all",
        lambda n: best(n["Table 1"][["band_gap"]], "mp_band_gap"),
    ),
    Claim(
        "Table 1",
        "Pretraining on DFT band gaps is tailored to them: it gains less over the random start "
        "on every other target.",
        "all",
        lambda n: own_gain_is_largest(_wetlab(n), "mp_band_gap", "band_gap"),
    ),
    Claim(
        "Table 1",
        "Pretraining on DFT formation energies is tailored to them likewise.",
        "all",
        lambda n: own_gain_is_largest(_wetlab(n), "mp_formation_energy", "formation_enthalpy"),
    ),
    Claim(
        "Table 1, ZT",
        "Performing well on ESTM does not make ZT right: of two models, one is no worse on the "
        "three properties and yet worse on ZT.",
        "some",
        lambda n: misleading_pairs(n["Table 1"]),
    ),
    Claim(
        "Table 1, ZT",
        "Structural information makes ZT right: mean error of infomax3d and polysrl below that "
        "of the four models without it, at both temperatures.",
        "all",
        lambda n: structure_helps(_zt(n)),
    ),
    Claim(
        "Table 1, ZT",
        "PolySRL has the lowest error of ZT of the six models at both temperatures.",
        "all",
        lambda n: best(_zt(n), "polysrl"),
    ),
    Claim(
        "Tables 1, 2",
        "Training the encoder too lowers the error (six models, nine targets).",
        "most",
        transfer_helps,
    ),
    Claim(
        "Table 2",
        "Negative transfer: a baseline is worse than the random start somewhere (four "
        "baselines, nine targets).",
        "some",
        lambda n: each_against_random(_transfer(n)),
    ),
    Claim(
        "Table 2",
        "PolySRL consistently transfers positively: it beats the random start.",
        "all",
        lambda n: better(_transfer(n), "polysrl", ["rand_init"]),
    ),
    Claim(
        "Table 2",
        "PolySRL is the best of the six models.",
        "paper",
        lambda n: best(_transfer(n), "polysrl"),
    ),
    Claim(
        "Table 4",
        "PolySRL beats the random start in R², representation.",
        "paper",
        lambda n: better(n["Table 4"], "polysrl", ["rand_init"]),
    ),
    Claim(
        "Table 5",
        "PolySRL beats the random start in R², transfer.",
        "paper",
        lambda n: better(n["Table 5"], "polysrl", ["rand_init"]),
    ),
    Claim(
        "Table 6",
        "Pretraining on DFT formation energies consistently beats that on DFT band gaps and "
        "3D Infomax (tasks whose labels none was pretrained on).",
        "all",
        lambda n: better(_fair(n), "mp_formation_energy", ["mp_band_gap", "infomax3d"]),
    ),
    Claim(
        "Table 6",
        "Pretraining on DFT formation energies is the best of the five baselines (the same tasks).",
        "most",
        lambda n: best(_fair(n), "mp_formation_energy", BASELINES),
    ),
    Claim(
        "Table 6",
        "Pretraining on DFT labels of a property is not the best of the six models on it.",
        "all",
        _own_property_is_not_enough,
    ),
    Claim(
        "Table 6",
        "PolySRL generally is the best of the six models (the same tasks).",
        "most",
        lambda n: best(_fair(n), "polysrl"),
    ),
    Claim(
        "Table 6",
        "PolySRL beats the random start.",
        "paper",
        lambda n: better(n["Table 6"], "polysrl", ["rand_init"]),
    ),
    Claim(
        "Table 7",
        "Polymorphism is crucial: PolySRL without sampling beats 3D Infomax.",
        "all",
        lambda n: better(_wetlab(n), "without_sampling", ["infomax3d"]),
    ),
    Claim(
        "Table 7",
        "Sampling typically helps: PolySRL beats itself without it.",
        "most",
        lambda n: better(_wetlab(n), "polysrl", ["without_sampling"]),
    ),
    Claim(
        "Table 8",
        "The random start beats Roost and CrabNet (peers without a run: errors of the paper).",
        "most",
        lambda n: better(_transfer(n), "rand_init", SUPERVISED),
    ),
    Claim(
        "Figure 8",
        "Screening at 300 K: PolySRL has the highest F1 of the six models.",
        "all",
        lambda n: best(n["screening"][["estm300_zt"]], "polysrl"),
    ),
    Claim(
        "Figure 8",
        "Screening at 600 K: PolySRL has the highest F1 but for 3D Infomax.",
        "all",
        lambda n: better(n["screening"][["estm600_zt"]], "polysrl", UNSTRUCTURED),
    ),
)


def verdict(claim: Claim, ours: Numbers, paper: Numbers) -> tuple[str, str, str]:
    """Verdict of a claim on our numbers.

    Returns
    -------
    verdict : {"holds", "does not hold", "not judged"}
        Not judged: an item that matters to the rule has no number, or no fair one.
    count : str
        On how many items ours agree, and on which they do not.
    paper : str
        On how many items the paper's own numbers agree.
    """
    items, theirs = claim.check(ours), claim.check(paper)
    agree, total, missing = int(items.eq(True).sum()), len(items), int(items.isna().sum())
    known = total - missing
    enough: dict[str, float] = {
        "all": total,
        "most": total // 2 + 1,
        "some": 1,
        "paper": np.nan if theirs.isna().any() else int(theirs.sum()),
    }
    needed = enough[claim.rule]
    if agree >= needed:
        word = "holds"
    elif agree + missing < needed:
        word = "does not hold"
    else:
        word = NOT_JUDGED
    against = [_label(name) for name, agrees in items.items() if agrees is False]
    text = f"{agree} of {known}" + f" ({missing} {NOT_JUDGED})" * (missing > 0)
    if 0 < len(against) <= len(WETLAB) and claim.rule != "some":
        text += f"; not {', '.join(against)}"
    known_theirs = int(theirs.notna().sum())
    return word, text, f"{int(theirs.eq(True).sum())} of {known_theirs}" if known_theirs else "-"


def _label(item: Any) -> str:
    """Short name of an item: a target, or a model and a target."""
    parts = item if isinstance(item, tuple) else (item,)
    return " ".join(SHORT[part] if part in SHORT else str(part) for part in parts)
