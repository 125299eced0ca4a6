"""What is known of a formula's structures, and the trends of the uncertainty with it."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import uncertainty
from polymorphs import (
    crystal_systems,
    distinct_structures,
    is_impure,
    structure_counts,
    structures_of,
)
from pymatgen.core import Lattice, Structure
from targets import Target
from uncertainty_figures import count_figure, group_figure

from polysrl_dc.errors import InvalidInputError

HALF = [0.5, 0.5, 0.5]
SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], HALF])
DENSE = Structure(Lattice.cubic(3.4), ["Na", "Cl"], [[0, 0, 0], HALF])


@pytest.mark.parametrize("formula", ["Bi2Te3", "Cu3.0SbSe4", "AgSn15.0BiTe17.0", "(NH4)2SO4"])
def test_whole_amounts_are_pure(formula):
    assert not is_impure(formula)


@pytest.mark.parametrize("formula", ["Ge0.99Mn0.01Te", "Cu2.1Se", "Hf0.8Ti0.2CoSb0.8Sn0.2"])
def test_other_amounts_are_impure(formula):
    assert is_impure(formula)


def test_what_is_no_formula_is_neither():
    with pytest.raises(InvalidInputError, match="Xx2"):
        is_impure("Xx2")


def test_structures_are_counted_by_reduced_formula():
    known = ["NaCl", "Cl2Na2", "TiO2", "O2Ti", "O4Ti2"]
    assert structure_counts(["ClNa", "Ti2O4", "KCl"], known).tolist() == [2, 3, 0]


def test_structures_come_back_from_the_table(tmp_path):
    rows = [
        {
            "material_id": str(i),
            "formula": "NaCl",
            "cell": [*structure.lattice.abc, *structure.lattice.angles],
            "numbers": list(structure.atomic_numbers),
            "frac_coords": structure.frac_coords.ravel().tolist(),
        }
        for i, structure in enumerate([SALT, DENSE, SALT * (1, 1, 2)])
    ]
    path = tmp_path / "structures.parquet"
    pd.DataFrame(rows).to_parquet(path)
    assert structures_of(path, "KCl") == []
    found = structures_of(path, "Na2Cl2")
    assert [item.composition.reduced_formula for item in found] == ["NaCl"] * 3
    assert crystal_systems(found) == ["cubic", "cubic", "cubic"]
    assert distinct_structures(found) == 2


def test_ties_count_half_in_the_chance_to_lie_above():
    found = uncertainty.above(np.array([1.0, 3.0]), np.array([1.0, 2.0]))
    assert found["statistic"] == pytest.approx(2.5 / 4)
    assert (found["n"], found["n_other"]) == (2, 2)
    assert found["mean"] == pytest.approx(np.log(3) / 2)


def test_the_test_of_lying_above_has_one_side():
    """Of the 20 orders of 3 and 3 values one has all of the first above."""
    high, low = np.array([4.0, 5.0, 6.0]), np.array([1.0, 2.0, 3.0])
    assert uncertainty.above(high, low)["p"] == pytest.approx(1 / 20)
    assert uncertainty.above(low, high)["p"] == 1


def test_formulas_without_a_structure_do_not_count_in_the_trend():
    counts = np.array([0, 1, 2, 3])
    found = uncertainty.rising(counts, np.array([9.0, 0.1, 0.2, 0.3]))
    assert found["n"] == 3
    assert found["statistic"] == pytest.approx(1.0)


def test_trends_compare_what_they_say(monkeypatch):
    """Sigma by formula: more structures, none, and impurity each make it greater."""
    sigmas = {"NaCl": 1.0, "KCl": 1.1, "MgO": 2.0, "CaO": 2.5, "Li3N": 4.0, "Bi2Te3": 1.0}
    sigmas |= {"Ge0.9Mn0.1Te": 3.0, "TiO2": 1.0, "ZnO": 5.0, "LiF": 3.0}
    monkeypatch.setattr(uncertainty, "uncertainties", lambda _, f: np.array([sigmas[x] for x in f]))
    known = pd.Series(["NaCl", "KCl", *["MgO"] * 2, *["CaO"] * 3, "TiO2", *["ZnO"] * 2])
    of = {name: ["Bi2Te3", "Ge0.9Mn0.1Te"] for name in uncertainty.THERMOELECTRICS.values()}
    of["band_gap"] = ["NaCl", "KCl", "MgO", "CaO", "Li3N", "LiF"]
    targets = {
        name: Target(name, "1", np.array(formulas), np.ones(len(formulas)), 1.0, 8)
        for name, formulas in of.items()
    }
    found = uncertainty.trends(None, known, np.array(["TiO2", "ZnO"]), targets)
    rows = found.set_index("trend")[["n", "n_other", "statistic"]]
    for more in ("several structures", "no known structure"):
        assert rows.loc[f"band gap: {more} above one"].tolist() == [2, 2, 1]
    rising = rows.filter(like="rising", axis=0)
    assert rising["n"].tolist() == [4, 4, 0, 0, 2]
    assert rising["statistic"].iloc[[0, 4]].tolist() == pytest.approx([0.9**0.5, 1])
    assert (rows.filter(like="impure", axis=0).to_numpy() == 1).all()


def test_cases_are_the_named_and_the_most_and_least_certain(tmp_path, monkeypatch):
    """Of formulas with three structures or more; certain is what has a small sigma."""
    formulas = [f"Na{n}Cl" for n in range(1, 14)]
    sigmas = {formula: float(n) for n, formula in enumerate(formulas)} | {"KCl": 3.5}
    monkeypatch.setattr(uncertainty, "CASES", ("KCl",))
    monkeypatch.setattr(uncertainty, "structures_of", lambda *_: [SALT, DENSE, SALT])
    monkeypatch.setattr(uncertainty, "uncertainties", lambda _, f: np.array([sigmas[x] for x in f]))
    known = pd.Series([*formulas[1:] * 3, *formulas[:1] * 2])
    found = uncertainty.cases(None, tmp_path, known, formulas)
    assert found["formula"].tolist() == ["KCl", *formulas[1:6], *formulas[:-6:-1]]
    assert found["chosen"].str.split().str[0].tolist() == ["named", *["most"] * 5, *["least"] * 5]
    assert found.iloc[0][["structures", "distinct", "systems"]].tolist() == [3, 2, "cubic 3"]
    assert found["percentile"].tolist()[:2] == pytest.approx([400 / 13, 100 / 13])


def test_great_errors_are_those_of_1_ev_and_more():
    found = uncertainty.by_error(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.1, 0.2, 1.0, 2.0]))
    assert found["n"].tolist() == [4, 2] and found["statistic"].tolist() == [1, 1]


def test_the_shipped_encoder_is_less_certain_of_formulas_with_many_structures():
    """Of the Materials Project: twelve or more structures against one."""
    from polysrl_dc import PolySRLModel

    model = PolySRLModel.from_pretrained("polysrl-mp")
    many = uncertainty.uncertainties(model, ["MgO", "ZnO", "SiO2", "TiO2", "ZnS", "C"])
    one = uncertainty.uncertainties(model, ["CaS", "HgCl", "RbF", "LaP", "YbTe", "SrSe"])
    assert np.log(many).mean() > np.log(one).mean() + 0.1
    np.testing.assert_allclose(many[:1] ** 2, model.predict_polymorphism(["MgO"]), rtol=1e-5)


def test_the_table_keeps_the_encoders_that_are_not_asked_for(tmp_path, monkeypatch):
    names = ("band_gap", *uncertainty.THERMOELECTRICS.values())
    salt, structures = (np.array(["NaCl"]), np.ones(1)), SimpleNamespace(formulas=["NaCl"])
    one, other = {"trend": ["rising", "above"], "p": [0.25, 0.5]}, {"trend": ["rising"], "p": 0.75}
    found = {
        "required_data_dir": tmp_path,
        "structures_path": tmp_path,
        "wetlab_targets": [Target(name, "eV", *salt, 1.0, 8) for name in names],
        "PolymorphDataset": structures,
        "split": (structures, structures),
        "cases": pd.DataFrame(),
        **dict.fromkeys(("structure_counts", "uncertainties"), np.ones(1)),
        **dict.fromkeys(("count_figure", "group_figure", "save")),
    }
    for name, value in found.items():
        monkeypatch.setattr(uncertainty, name, lambda *_, value=value, **__: value)
    for encoder, rows in (("a=polysrl-mp", one), ("polysrl-mp", other)):
        monkeypatch.setattr(uncertainty, "trends", lambda *_, rows=rows: pd.DataFrame(rows))
        uncertainty.main(["--encoders", encoder, "--output-dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "uncertainty.csv").set_index(["encoder", "trend"])["p"]
    assert table.to_dict() == {
        ("a", "above"): 0.5,
        ("a", "rising"): 0.25,
        ("polysrl-mp", "rising"): 0.75,
    }


def test_figures_hold_every_group():
    figure = count_figure(np.array([0, 1, 1, 7, 7]), np.array([0.1, 0.2, 0.3, 0.2, 0.1]))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "7+"]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "2"]
    assert len(group_figure({"a": np.array([1.0, 2.0])}).axes[0].texts) == 1
