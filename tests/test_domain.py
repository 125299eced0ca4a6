"""How far formulas are from a reference: distances, elements, calibration, and the command."""

import warnings

import deepchem as dc
import numpy as np
import pandas as pd
import pytest
from models import data, fitted
from pymatgen.core import Composition, Lattice, Structure

from polysrl_dc import InvalidInputError, PolymorphDataset, PolySRLModel
from polysrl_dc.cli import main
from polysrl_dc.domain import Domain, OutsideDomainWarning, keep_formulas
from polysrl_dc.elements import N_ELEMENTS
from polysrl_dc.featurizers import StoichiometryGraphFeaturizer

CATIONS = "Li Na K Rb Cs Ca Sr Zn Cd Al Ga In Ti Fe Cu Pb".split()
KNOWN = [f"{cation}{i % 3 + 1}{anion}{i % 2 + 1}" for i, cation in enumerate(CATIONS * 2)
         for anion in ("O", "S", "Cl", "Te", "O4")]  # fmt: skip
KNOWN += ["Na2Cl2", "Na3Cl3"]
IDS = [f"id{row}" for row in range(len(KNOWN))]
ASKED = ["Na4Cl4", "Bi2Te3", "Ag0.02Pb0.98Te", "FmLr3", "Lr"]


class Flat:
    """A model to which all formulas are alike, but for those with an element beyond uranium."""

    def predict_embedding(self, dataset):
        heavy = [max(graph.numbers) > 92 for graph in dataset.X]
        return np.eye(2, dtype=np.float32)[np.array(heavy, dtype=int)]


@pytest.fixture(scope="module")
def domain(encoder):
    return Domain(encoder, dc.data.NumpyDataset(featurize(KNOWN), ids=IDS))


def featurize(formulas):
    return StoichiometryGraphFeaturizer().featurize(list(formulas))


def embedded(model, formulas):
    return model.predict_embedding(dc.data.NumpyDataset(featurize(formulas))).astype(float)


def salts():
    """Rock salt of three anions; sodium chloride twice."""
    for anion, length in [("Cl", 5.64), ("F", 4.63), ("I", 6.47), ("Cl", 5.7)]:
        yield Structure.from_spacegroup(
            "Fm-3m", Lattice.cubic(length), ["Na", anion], [[0, 0, 0], [0.5, 0.5, 0.5]]
        )


@pytest.mark.filterwarnings("ignore::polysrl_dc.domain.OutsideDomainWarning")
def test_distances_and_structures_are_those_of_a_full_comparison(encoder, domain):
    names = np.array([graph.formula for graph in featurize(KNOWN)])
    known = np.unique(names)
    assert domain.formulas.tolist() == known.tolist()
    vectors, k = embedded(encoder, known), 7
    found = domain.query(ASKED, k=k)
    distances = np.linalg.norm(embedded(encoder, ASKED)[:, None] - vectors, axis=2)
    np.testing.assert_allclose(
        found["distance"].to_numpy().reshape(-1, k), np.sort(distances)[:, :k], atol=1e-5
    )
    at = np.searchsorted(known, found["nearest"].to_numpy(str))
    rows = np.repeat(np.arange(len(ASKED)), k)
    np.testing.assert_allclose(distances[rows, at], found["distance"], atol=1e-5)
    for name, ids, n in found[["nearest", "structures", "n_structures"]].itertuples(index=False):
        assert ids.tolist() == np.array(IDS)[names == name].tolist()
        assert n == len(ids) > 0
    assert found["rank"].tolist() == [*range(1, k + 1)] * len(ASKED)
    assert found.index.tolist() == [formula for formula in ASKED for _ in range(k)]
    assert found["n_structures"].iloc[0] == 3


def test_far_means_further_than_reference_formulas_are_from_each_other(encoder, domain):
    vectors = embedded(encoder, domain.formulas)
    own = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    np.fill_diagonal(own, np.inf)
    np.testing.assert_allclose(domain.own_distances, np.sort(own.min(1)), atol=1e-5)
    assert domain.threshold == np.percentile(domain.own_distances, 99)
    few = Domain(encoder, KNOWN, n_sampled=50, percentile=10)
    assert len(few.own_distances) == 50
    assert few.threshold == np.percentile(few.own_distances, 10)
    nearest = np.searchsorted(own.min(1)[np.argsort(own.min(1))] + 2e-6, few.own_distances)
    assert len(np.unique(nearest)) > 25  # a sample of them, not the first one fifty times
    other = Domain(encoder, KNOWN, n_sampled=50, seed=1)
    assert not np.array_equal(other.own_distances, few.own_distances)
    most = Domain(encoder, KNOWN, n_sampled=len(own) - 1).own_distances  # none of them twice
    without = [np.delete(domain.own_distances, row) for row in range(len(own))]
    assert min(np.abs(part - most).max() for part in without) < 1e-5
    asked = ["Bi2Te3", "Ag0.02Pb0.98Te", "Sb2Te3"]
    with pytest.warns(OutsideDomainWarning):
        found = few.query(asked, k=1)
    share = [100 * (few.own_distances < distance).mean() for distance in found["distance"]]
    np.testing.assert_allclose(found["percentile"], share)
    assert found["outside"].tolist() == (found["distance"] > few.threshold).tolist()


def test_the_same_reduced_formula_is_its_own_nearest_at_no_distance(domain):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = domain.query(["Na4Cl4", "Ti0.5O0.5"], k=3)
    first = found[found["rank"] == 1]
    assert first["nearest"].tolist() == ["NaCl", "TiO"]
    assert first["distance"].tolist() == [0.0, 0.0] == first["percentile"].tolist()
    assert not found["outside"].any()
    assert (found["distance"][found["rank"] > 1] > 0).all()


def test_formulas_of_one_embedding_do_not_take_each_others_place():
    flat = Domain(Flat(), ["NaCl", "KCl", "RbCl", "CsCl"])
    asked = ["KCl", "CsCl", "NaCl", "RbCl"]
    found = flat.query(asked, k=1)
    assert found["nearest"].tolist() == asked
    assert found["percentile"].tolist() == [0.0] * 4  # of distances below, not equal
    assert flat.own_distances.tolist() == [0.0] * 4
    assert flat.threshold == 0 and not flat.outside(asked).any()  # at the threshold, not above it
    wide = flat.query(["CsCl"], k=4)
    assert sorted(wide["nearest"]) == ["CsCl", "KCl", "NaCl", "RbCl"]
    assert wide["nearest"].iloc[0] == "CsCl"


def test_unseen_elements_and_distance_each_put_a_formula_outside():
    flat = Domain(Flat(), ["NaCl", "KBr", "U", "PuNp"])
    assert flat.threshold == pytest.approx(np.percentile([0, 0, 0, np.sqrt(2)], 99))
    with pytest.warns(OutsideDomainWarning, match=r"2 of 3 .*first is LiF, .*lacks \(Li F\)") as w:
        found = flat.query(["NaBr", "LiF", "NaAm"], k=1)
    assert len(w) == 1 and w[0].filename == __file__
    assert found["unseen"].tolist() == ["", "Li F", "Am"]
    assert found["outside"].tolist() == [False, True, True]
    traces = [("Na0.99999Li0.00001Cl", "Li"), ("Na0.99999K0.00001Cl", "")]
    with pytest.warns(OutsideDomainWarning, match="1 of 2"):
        found = flat.query([formula for formula, _ in traces], k=1)
    assert found["unseen"].tolist() == [symbols for _, symbols in traces]
    near = Domain(Flat(), ["NaCl", "KBr", "U"])
    near.elements[94] = True
    with pytest.warns(OutsideDomainWarning, match=r"1 of 2 .*first is Pu, at 1.414, further"):
        found = near.query(["UBr", "Pu"], k=1)
    assert found["unseen"].tolist() == ["", ""]
    assert found["outside"].tolist() == [False, True]


def test_every_kind_of_reference_is_the_same_one(encoder, tmp_path):
    structures = list(salts())
    packed = PolymorphDataset(structures, cache_dir=tmp_path, progress=False, processes=1)
    formulas = [structure.composition for structure in structures]
    graphs = featurize(formulas)
    one = Domain(encoder, packed)
    assert one.formulas.tolist() == ["NaCl", "NaF", "NaI"]
    assert np.flatnonzero(one.elements).tolist() == [9, 11, 17, 53]
    assert len(one.elements) == N_ELEMENTS
    asked = packed.select([1, 3])
    expected = one.query(asked, k=2)
    assert expected.index.tolist() == [asked.ids[0]] * 2 + [asked.ids[1]] * 2
    assert expected["n_structures"][expected["rank"] == 1].tolist() == [1, 2]
    for reference in (
        dc.data.NumpyDataset(packed.X, ids=packed.ids),
        dc.data.NumpyDataset(graphs, ids=packed.ids),
        dc.data.DiskDataset.from_numpy(graphs, ids=packed.ids),
        pd.Series(formulas, index=[7, 7, 8, 9]),
        (formula for formula in formulas),
    ):
        other = Domain(encoder, reference)
        found = other.query(dc.data.NumpyDataset(graphs[[1, 3]], ids=asked.ids), k=2)
        named = [ids.tolist() for ids in other.structures]
        if isinstance(reference, dc.data.Dataset):
            assert named == [ids.tolist() for ids in one.structures]
        else:
            assert named[0] == [str(formulas[0])] * 2
        pd.testing.assert_frame_equal(
            found.drop(columns="structures"), expected.drop(columns="structures"), atol=1e-5
        )


def test_a_single_formula_is_one_row(domain):
    for formula in ("Na2Cl2", {"Na": 1, "Cl": 1}, Composition("NaCl")):
        assert domain.query(formula, k=1)["nearest"].tolist() == ["NaCl"]


def test_bad_input_is_named(encoder, domain):
    with pytest.raises(InvalidInputError, match=r"row 1: .*Xx2O3"):
        Domain(encoder, ["NaCl", "Xx2O3"])
    with pytest.raises(InvalidInputError, match=r"row 2: .*Qq"):
        domain.query(["NaCl", Composition("KCl"), "Qq"])
    skipped = StoichiometryGraphFeaturizer(on_error="skip").featurize(["NaCl", "Qq"])
    for read in (lambda data: Domain(encoder, data), domain.query):
        with pytest.raises(InvalidInputError, match=r"row 1 \(id b\)"):
            read(dc.data.NumpyDataset(skipped, ids=["a", "b"]))
        for empty in ([], dc.data.NumpyDataset(np.zeros((0, 1)), np.zeros((0, 1)))):
            with pytest.raises(InvalidInputError, match=r"no (row|formula)"):
                read(empty)
    with pytest.raises(InvalidInputError, match="no formula but NaCl"):
        Domain(encoder, ["NaCl", "Na2Cl2"])
    for k in (0, len(domain.formulas) + 1):
        with pytest.raises(ValueError, match=f"k is {k}"):
            domain.query("NaCl", k=k)
    for settings in ({"percentile": 101}, {"percentile": float("nan")}, {"n_sampled": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} is"):
            Domain(encoder, ["NaCl", "KCl"], **settings)


def test_the_command_writes_the_table_and_counts(tmp_path, capsys):
    files = []
    for i, salt in enumerate(salts()):
        files.append(f"{tmp_path}/{i}.cif")
        salt.to(files[-1])
    asked, output = tmp_path / "asked.csv", tmp_path / "domain.parquet"
    pd.DataFrame({"name": ["Na2Cl2", "PuO2", "Qq"], "note": [1, 2, 3]}).to_csv(asked, index=False)
    command = ["domain", "--input", str(asked), "--column", "name", "--output", str(output)]
    assert main([*command, "--structures", *files, "--on-error", "skip"]) == 0
    errors = capsys.readouterr().err
    assert "1 of 2 formulas lie outside" in errors and "from all 3 of" in errors
    assert "Warning" not in errors
    frame = pd.read_parquet(output)
    assert frame["name"].tolist() == ["Na2Cl2"] * 3 + ["PuO2"] * 3  # three, though k is five
    assert frame["note"].tolist() == [1] * 3 + [2] * 3
    assert frame["unseen"].tolist() == [""] * 3 + ["O Pu"] * 3
    assert frame["outside"].tolist() == [False] * 3 + [True] * 3
    assert frame["nearest"].iloc[0] == "NaCl" and frame["distance"].iloc[0] == 0
    assert frame["structures"].iloc[0] == f"{files[0]};{files[3]}"

    table = tmp_path / "known.csv"
    table.write_text("formula\nNaCl\nKCl\nNa2Cl2\n")
    assert main(["domain", "NaCl", "KBr", "--reference", str(table), "-k", "1"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[1] == "NaCl,False,,0.0,1,NaCl,0.0,2,0;2"
    assert lines[2].startswith("KBr,True,Br,") and len(lines) == 3
    assert "1 of 2 formulas" in captured.err


def test_outside_is_what_a_query_says(encoder, domain):
    asked = [*ASKED, *KNOWN[:40], "RbI", "CsPbI3", "Fe2O3", "YBa2Cu3O7", "W"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutsideDomainWarning)
        queried = domain.query(asked, k=1)
    expected = queried["outside"].to_numpy()
    found = domain.outside(asked)
    assert found.dtype == bool and 0 < found.sum() < len(asked)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(domain.distance(asked), queried["distance"], atol=1e-4)
    np.testing.assert_array_equal(domain.outside(dc.data.NumpyDataset(featurize(asked))), expected)
    np.testing.assert_array_equal(domain.outside(asked, domain.distance(asked)), expected)
    with pytest.raises(ValueError, match="distance has shape"):
        domain.outside(asked, domain.distance(asked[1:]))
    with pytest.raises(InvalidInputError, match=r"row 1: .*Qq"):
        domain.outside(["NaCl", "Qq"])


def test_a_model_holds_the_formulas_it_has_learned_from(tmp_path, capsys):
    table, folder = tmp_path / "gaps.csv", str(tmp_path / "model")
    traced = "Si0.99999P0.00001"  # whose reduced formula is one of fractions
    rows = [("Na2Cl2", 1), ("NaCl", 2), ("KCl", 3), (traced, 4), ("PuO2", "")]
    pd.DataFrame(rows, columns=["formula", "gap"]).to_csv(table, index=False)
    command = ["train", "--input", str(table), "--target", "gap", "--epochs", "1"]
    assert main([*command, "--output-dir", folder]) == 0
    model = PolySRLModel.from_pretrained(folder)
    kept = Domain(model)
    assert kept.formulas.tolist() == ["KCl", "NaCl", "Si0.99999 P0.00001"]
    found = kept.query(["Na3Cl3", traced], k=1)
    assert not found["outside"].any() and found["distance"].tolist() == [0, 0]
    capsys.readouterr()
    assert main(["domain", "Na2Cl2", "PuO2", "--model", folder, "-k", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Na2Cl2,False,,0.0,1,NaCl,0.0,1,NaCl"
    assert lines[2].startswith("PuO2,True,O Pu,")
    assert main(["predict", "Na2Cl2", "PuO2", "--model", folder]) == 0
    assert [line.split(",")[-1] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "False",
        "True",
    ]
    assert main(["predict", "PuO2", "--model", folder, "--no-outside"]) == 0
    assert "outside" not in "".join(capsys.readouterr())
    asked = tmp_path / "asked.csv"
    asked.write_text("formula,outside\nNaCl,False\n")
    assert main(["predict", "--input", str(asked), "--model", folder]) == 2
    assert "outside" in capsys.readouterr().err
    model.fit(dc.data.NumpyDataset(featurize(["UO2", "PuO2"]), [1.0, 2.0]), nb_epoch=1)
    assert "formulas" not in model.provenance  # it has learned from others since
    table.write_text("formula,gap\nNaCl,1\nNa2Cl2,2\n")  # one formula has no distances
    assert main([*command, "--output-dir", folder]) == 0
    capsys.readouterr()
    assert main(["predict", "NaCl", "--model", folder]) == 0
    captured = capsys.readouterr()
    assert "outside" not in captured.out
    assert "no column outside: the model holds no formulas it has learned from" in captured.err
    assert main(["domain", "NaCl", "--model", folder]) == 2
    with pytest.raises(ValueError, match="does not hold the formulas"):
        Domain(PolySRLModel.from_pretrained("polysrl-mp"))


def test_the_domain_of_a_model_is_made_once_for_the_formulas_that_it_holds(tmp_path):
    model = fitted(model_dir=str(tmp_path))
    assert model.domain is None
    keep_formulas(model, data())
    first = model.domain
    assert first is model.domain and first.formulas.tolist() == sorted(g.formula for g in data().X)
    model.save()
    keep_formulas(model, data(formulas=["NaCl", "KCl"], y=[1, 2]))
    assert model.domain.formulas.tolist() == ["KCl", "NaCl"]
    model.reload()
    assert model.domain.formulas.tolist() == first.formulas.tolist()
    model.fit(data(), nb_epoch=1, checkpoint_interval=0)
    assert model.domain is None
    keep_formulas(model, data(formulas=["NaCl", "Na2Cl2"], y=[1, 2]))
    assert model.domain is None  # one formula has no distances


def test_rows_that_a_model_has_not_learned_from_are_no_reference(tmp_path, capsys):
    table, model = tmp_path / "gaps.csv", str(tmp_path / "model")
    salts = "".join(f"{metal}Cl,{row},1\n" for row, metal in enumerate(("Li", "Na", "K", "Rb")))
    table.write_text(f"formula,gap,size\n{salts}PuO2,,1\nPuN,x,1\n")
    strict = ["domain", "PuO2", "NaCl", "--reference", str(table), "-k", "1"]
    asked = [*strict, "--on-error", "skip"]
    command = ["train", "--input", str(table), "--target", "gap", "--epochs", "1"]
    assert main([*command, "--on-error", "skip", "--output-dir", model]) == 0
    for told, n in (
        (["--model", model], 2),
        (["--target", "gap"], 2),
        (["--model", model, "--target", "gap", "size"], 0),
        ([], 0),
    ):
        capsys.readouterr()
        assert main([*asked, *told]) == 0
        captured = capsys.readouterr()
        outside = [line.split(",")[1] for line in captured.out.splitlines()[1:]]
        assert outside == [str(n > 0), "False"]
        said = "skipped row 5: gap is 'x', not a number\nrows without gap, left out: 1\n"
        assert (said in captured.err) == (n > 0)
        assert ("row 5: gap is 'x', not a number\n" in captured.err) == bool(told)
        assert main([*strict, *told]) == (2 if told else 0)
        assert ("error: row 5: gap is 'x'" in capsys.readouterr().err) == bool(told)
    table.write_text("formula,size\nNaCl,1\nPuO2,1\n")  # without the target of the model
    assert main([*asked, "--model", model]) == 0 and "left out" not in capsys.readouterr().err
    table.write_text("formula,gap\nNaCl,\nPuO2,\n")
    assert main([*asked, "--model", model]) == 2
    assert f"{table} has no label of gap" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["NaCl"], "polysrl-mp does not hold the formulas it has learned from: give --reference"),
        (["NaCl", "--reference", "nowhere.csv"], "nowhere.csv"),
        (["NaCl", "--structures", "nowhere.parquet"], "nowhere.parquet"),
        (["--structures", "nowhere.parquet"], "give either formulas or --input"),
        (["NaCl", "--reference", "x.csv", "--structures", "y.cif"], "not allowed with"),
        (["NaCl", "--structures", "y.cif", "--target", "gap"], "--target needs --reference"),
    ],
)
def test_errors_of_the_command_are_one_clear_line(arguments, part, capsys):
    try:
        status = main(["domain", *arguments])
    except SystemExit as usage:
        status = usage.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert part in captured.err.splitlines()[-1]
