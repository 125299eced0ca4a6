"""The paper's targets: what becomes of every row, folds, ids."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import targets
from folds import group_key
from targets import Target, estm_rows, matbench_target, wetlab_targets
from tasks import DataNotFoundError

SIZES = {
    "band_gap": 2482,
    "formation_enthalpy": 1140,
    "metallic": 584,
    "estm300_electrical_conductivity": 368,
    "estm300_thermal_conductivity": 368,
    "estm300_seebeck": 368,
    "estm600_electrical_conductivity": 188,
    "estm600_thermal_conductivity": 188,
    "estm600_seebeck": 188,
}


def small(formulas: list[str], **changes: float) -> Target:
    values = np.arange(len(formulas), dtype=float)
    return Target("small", "1", np.array(formulas), values, 1.0, 8, **changes)


def test_wetlab_targets_have_the_sizes_of_the_paper_and_account_for_every_row(data_dir):
    found = wetlab_targets(data_dir)
    assert {target.name: len(target.values) for target in found} == SIZES
    assert all(np.isfinite(target.values).all() for target in found)
    gap = found[0]
    assert gap.account == (
        "6,354 measurements, 2,458 of no gap and 1 without a formula left out, 1,413 averaged "
        "away: 2,482 formulas"
    )
    assert 6354 - 2458 - 1 - 1413 == 2482


def test_a_formula_measured_twice_has_the_mean(data_dir):
    raw = pd.read_csv(data_dir / "wetlab" / "expt_gap.csv")
    raw = raw[raw["gap expt"] != 0]
    name = raw["formula"].value_counts().index[0]
    gap = wetlab_targets(data_dir)[0]
    value = gap.values[gap.formulas == name]
    assert len(value) == 1
    assert value[0] == pytest.approx(raw.loc[raw["formula"] == name, "gap expt"].mean())


def test_estm_targets_are_the_transformed_columns(data_dir):
    by_name = {target.name: target for target in wetlab_targets(data_dir)}
    rows = estm_rows(data_dir, 600)
    sigma = by_name["estm600_electrical_conductivity"]
    np.testing.assert_allclose(np.exp(sigma.values), rows["electrical_conductivity"])
    assert (sigma.formulas == rows["Formula"].to_numpy()).all()
    seebeck = by_name["estm600_seebeck"].values
    assert seebeck.min() == 0 and seebeck.max() == 1
    low, high = rows["seebeck_coefficient"].agg(["min", "max"])
    np.testing.assert_allclose(seebeck * (high - low) + low, rows["seebeck_coefficient"])


def test_folds_are_those_of_matbench_and_of_the_task():
    target = small([f"Na{i}Cl" for i in range(1, 24)])
    ids = [f"wl-small-{number:04d}" for number in range(1, 24)]
    for fold, (train, test) in enumerate(target.splits()):
        expected = target.task.validation[f"fold_{fold}"]
        assert [ids[i] for i in train] == list(expected.train)
        assert [ids[i] for i in test] == list(expected.test)


def test_grouped_folds_share_no_reduced_formula():
    formulas = [f"{text}" for i in range(1, 9) for text in (f"Na{i}Cl", f"Na{2 * i}Cl2", f"K{i}Br")]
    target = small(formulas)
    keys = np.array([group_key(formula) for formula in formulas])
    held_out = []
    for train, test in target.splits(target.compositions):
        assert not set(keys[train]) & set(keys[test])
        held_out.extend(test)
    assert sorted(held_out) == list(range(len(formulas)))
    assert any(set(keys[a]) & set(keys[b]) for a, b in target.splits())


def test_folds_by_publication_share_none(data_dir):
    targets = {target.name: target for target in wetlab_targets(data_dir)}
    target = targets["estm600_seebeck"]
    assert list(target.publications) == list(estm_rows(data_dir, 600)["reference"])
    for train, test in target.splits(target.publications):
        assert not set(target.publications[train]) & set(target.publications[test])
    assert targets["band_gap"].publications is None


def test_72_8_20():
    target = small([f"Na{i}Cl" for i in range(1, 101)], held_back=0.1)
    for train, test in target.splits():
        assert (len(train), len(test)) == (72, 20) and not set(train) & set(test)


@pytest.mark.parametrize(
    ("name", "rows"), [("matbench_jdft2d", 568), ("matbench_dielectric", 3992)]
)
def test_matbench_targets_have_one_row_per_formula(data_dir, name, rows):
    target = matbench_target(name, data_dir)
    assert len(target.values) == len({group_key(formula) for formula in target.formulas}) == rows
    raw = pd.read_csv(data_dir / "matbench" / f"{name}.csv.gz")
    column = next(c for c in raw if c not in ("mbid", "composition", "space_group_number"))
    means = raw[column].groupby(raw["composition"].map(group_key).to_numpy()).mean()
    expected = means[target.formulas].to_numpy()
    if name == "matbench_jdft2d":
        expected = np.log(expected)
    np.testing.assert_allclose(target.values, expected)


@pytest.mark.parametrize(
    ("name", "unit", "factor"),
    [
        ("matbench_perovskites", "eV/unit cell", 1),
        ("matbench_dielectric", "1", 1),
        ("matbench_log_gvrh", "log10 GPa", 1),
        ("matbench_log_kvrh", "log10 GPa", 10),
        ("matbench_jdft2d", "ln meV/atom", 1),
    ],
)
def test_matbench_targets_are_reported_as_in_table_6(monkeypatch, name, unit, factor):
    """And a tenth of each training fold is left unused, for 72/8/20."""
    frame = pd.DataFrame({"structure": ["NaCl", "Na2Cl2", "KCl"], "value": [1.0, 3.0, 5.0]})
    metadata = SimpleNamespace(target="value", input_type="structure")
    task = SimpleNamespace(df=frame, metadata=metadata)
    monkeypatch.setattr(targets, "load_task", lambda *_: task)
    target = matbench_target(name, None)
    assert (target.unit, target.scale, target.held_back) == (unit, factor, 0.1)
    means = dict(zip(target.formulas, target.values, strict=True))
    expected = np.log([5.0, 2.0]) if name == "matbench_jdft2d" else [5.0, 2.0]
    assert [means["KCl"], means["NaCl"]] == pytest.approx(list(expected))


def test_the_band_gap_of_a_formula_is_that_of_its_stable_polymorph(monkeypatch):
    def table(column, values):
        return pd.DataFrame(
            {"structure": ["NaCl", "Na2Cl2", "KCl", "MgO", "CaO", "Ca2O2"], column: values},
            index=list("abcdef"),
        )

    tables = {
        "matbench_mp_gap": ("gap pbe", [5.0, 4.0, 3.0, 2.0, 6.0, 8.0]),
        "matbench_mp_e_form": ("e_form", [-1.0, -2.0, -1.0, -1.0, -1.0, -2.0]),
    }

    class Task:
        def __init__(self, name):
            column, values = tables[name]
            self.df = table(column, values)
            self.metadata = type("M", (), {"target": column, "input_type": "structure"})

    groups = {
        "matbench_mp_gap": pd.Series([225, 221, 225, 1, 225, 225], index=list("abcdef")),
        "matbench_mp_e_form": pd.Series([225, 221, 225, 225, 225, 225], index=list("abcdef")),
    }
    monkeypatch.setattr(targets, "load_task", lambda name, _: Task(name))
    monkeypatch.setattr(targets, "_space_groups", lambda name, _: groups[name])
    targets._lowest_space_groups.cache_clear()
    gap = matbench_target("matbench_mp_gap", "anywhere")
    targets._lowest_space_groups.cache_clear()
    found = dict(zip(gap.formulas, gap.values, strict=True))
    assert found == {"CaO": 7.0, "KCl": 3.0, "MgO": 2.0, "NaCl": 4.0}
    assert gap.account.endswith(
        "4 formulas (polymorph of lowest formation energy; 1 the mean of its space group, 1 of all "
        "rows)"
    )
    energy = matbench_target("matbench_mp_e_form", "anywhere")
    assert dict(zip(energy.formulas, energy.values, strict=True))["NaCl"] == -2.0


def test_a_missing_table_is_named_with_its_source(tmp_path, monkeypatch):
    def offline(name):
        raise OSError("no network")

    monkeypatch.setattr(targets, "load_dataset", offline)
    with pytest.raises(DataNotFoundError, match=r"expt_gap.csv is missing.*OSError"):
        wetlab_targets(tmp_path)
    with pytest.raises(DataNotFoundError, match="ESTM of Na & Chang"):
        estm_rows(tmp_path, 300)
