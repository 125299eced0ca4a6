"""Generated formulas, crystals and tables, good and bad, through every entrance.

What is drawn is known: each input ends in the right answer or in InvalidInputError naming its row,
id and value; never in a changed number of rows, a shifted label, a NaN or no end. Good and bad rows
stand in one table, so that a row that is lost would shift the others.
"""

from collections import Counter

import deepchem as dc
import numpy as np
import pandas as pd
import pytest
from cells import Crystal, bad_crystals, good_crystals, neighbors
from drawing import draw
from formulas import Formula, any_text, formulas, written
from hypothesis import example, given
from hypothesis import strategies as st
from models import dataset_of
from pymatgen.core import Composition, Lattice, Structure

import polysrl_dc
from polysrl_dc.datasets import drop_skipped
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.graphs import StoichiometryGraph


def exact_graph(formula):
    """The graph of a drawn formula, from what it is and not from how it is written."""
    return StoichiometryGraph(np.array(formula.numbers, np.uint8), formula.fractions)


def may_be_refused(formula, message):
    """Whether it has to be, or is one of those whose dot has two meanings."""
    return formula.amounts is None or (
        isinstance(formula.given, str) and "." in formula.given and "its dot may be" in message
    )


def check_rows(featurizer, values, tally, right, refusable):
    """Featurize rows; the good ones are right and keep their label and id, the bad ones are named.

    Returns the dataset of the good rows and their numbers.
    """
    ids = [f"mp-{row}" for row in range(len(values))]
    graphs = featurizer.featurize(values)
    assert len(graphs) == len(values)
    skipped = dict(featurizer.skipped)
    good = [row for row in range(len(values)) if row not in skipped]
    for row, message in skipped.items():
        assert refusable(row, message), (row, message)
        assert np.size(graphs[row]) == 0
        tally.refused()
    for row in good:
        assert right(row, graphs[row]), (row, graphs[row])
        tally.right()
    dataset = dataset_of(graphs, y=np.arange(len(values)), ids=ids)
    if not good:
        return None, good
    kept = drop_skipped(dataset)
    assert kept.y.tolist() == good and kept.ids.tolist() == [ids[row] for row in good]
    if skipped:
        first = min(skipped)
        with pytest.raises(InvalidInputError, match=rf"^row {first}: "):
            type(featurizer)().featurize(values)
        with pytest.raises(InvalidInputError, match=rf"^row {first} \(id mp-{first}\)"):
            dc.splits.StoichiometrySplitter().split(dataset)
    return kept, good


# ------------------------------------------------------------------- formulas


def test_formulas(deep, tally, encoder):
    @given(st.lists(formulas(), min_size=1, max_size=12))
    @example([Formula("CuSO4.5H2O", None), Formula("MgCl2.6H2O", None)])
    @example([Formula({"Fe2": 1, "O3": 1}, None), Formula({"Fe": 2, "O": 3}, {"Fe": 2, "O": 3})])
    @example([Formula("Fe2@O3", None), Formula("Fe٣O", None), Formula("Fe1e2O", None)])
    @example([Formula({10**400: 1}, None), Formula({True: 1}, None)])
    def check(drawn):
        values = [formula.given for formula in drawn]
        featurizer = polysrl_dc.StoichiometryGraphFeaturizer(on_error="skip")

        def right(row, graph):
            formula = drawn[row]
            assert formula.amounts is not None, formula
            np.testing.assert_allclose(graph.fractions, formula.fractions, rtol=1e-9, atol=0)
            return graph.numbers.tolist() == formula.numbers and graph.formula

        def refusable(row, message):
            assert repr(values[row])[:15] in message
            return may_be_refused(drawn[row], message)

        with tally.inputs(len(drawn)):
            dataset, good = check_rows(featurizer, values, tally, right, refusable)
            if good:
                found = encoder.predict_embedding(dataset)
                expected = encoder.predict_embedding(
                    dataset_of([exact_graph(drawn[row]) for row in good])
                )
                np.testing.assert_allclose(found, expected, atol=1e-5)
                np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
                assert np.isfinite(encoder.predict_polymorphism(dataset)).all()

    draw(check, deep, few=40, many=1200)


@pytest.mark.parametrize(
    "container",
    [tuple, iter, pd.Index, lambda rows: pd.Series(rows, dtype=object), np.array],
    ids=["tuple", "iterator", "index", "series", "array"],
)
def test_text_in_any_container(container, deep, tally):
    text = (written() | any_text()).filter(lambda formula: "\0" not in formula.given)

    @given(st.lists(text, min_size=1, max_size=9))  # of NumPy, which takes zeros from the end
    def check(drawn):
        featurizer = polysrl_dc.StoichiometryGraphFeaturizer(on_error="skip")
        values = [formula.given for formula in drawn]
        with tally.inputs(len(drawn)):
            graphs = featurizer.featurize(container(values))
            skipped = dict(featurizer.skipped)
            assert len(graphs) == len(drawn)
            for row, (formula, graph) in enumerate(zip(drawn, graphs, strict=True)):
                if row in skipped:
                    assert may_be_refused(formula, skipped[row])
                    tally.refused()
                else:
                    assert graph.numbers.tolist() == formula.numbers
                    tally.right()

    draw(check, deep, few=4, many=60)


def test_pymatgen_reads_the_same(deep, tally):
    @given(written().filter(lambda formula: "0.000000000001" not in formula.given))
    def check(formula):  # of those amounts pymatgen takes nothing
        with tally.inputs(1):
            try:
                graph = polysrl_dc.StoichiometryGraphFeaturizer().featurize(formula.given)[0]
            except InvalidInputError as error:
                assert may_be_refused(formula, str(error))
                tally.refused()
                return
            theirs = Composition(formula.given)
            fractions = {el.Z: theirs.get_atomic_fraction(el) for el in theirs}
            assert sorted(fractions) == graph.numbers.tolist()
            expected = [fractions[z] for z in sorted(fractions)]
            np.testing.assert_allclose(graph.fractions, expected, rtol=1e-6)
            tally.right()

    draw(check, deep, few=30, many=1500)


@pytest.mark.parametrize(
    "value", [np.array("NaCl"), "NaCl", Composition("NaCl"), {"Na": 1, "Cl": 1}], ids=repr
)
def test_one_formula_is_one_row(value):
    assert len(polysrl_dc.StoichiometryGraphFeaturizer().featurize(value)) == 1


@pytest.mark.parametrize(
    "value",
    [{"NaCl", "KCl"}, pd.DataFrame({"NaCl": ["KCl"]}), pd.NA, object(), np.array(5), frozenset()],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_order_of_rows_is_refused(value):
    with pytest.raises(InvalidInputError, match="is not a formula"):
        polysrl_dc.StoichiometryGraphFeaturizer().featurize(value)


# ------------------------------------------------------------------- crystals


def is_right(crystal: Crystal, graph) -> bool:
    """Whether elements and neighbors are those of the plain cell, by brute force."""
    assert crystal.cell is not None and crystal.site is not None
    assert graph.numbers.tolist() == crystal.numbers[crystal.site].tolist()
    amounts = Counter(graph.numbers.tolist())
    assert graph.stoichiometry.numbers.tolist() == sorted(amounts)
    np.testing.assert_allclose(
        graph.stoichiometry.fractions, [amounts[z] / len(graph.numbers) for z in sorted(amounts)]
    )
    expected = neighbors(crystal.cell, crystal.coords)
    for i, site in enumerate(crystal.site):
        part = slice(graph.indptr[i], graph.indptr[i + 1])
        theirs, ends = expected[site]
        kept = graph.distances[part]
        if len(kept) != min(12, len(theirs)) or not np.allclose(kept, theirs[:12], atol=3e-5):
            return False
        for end in set(crystal.site[graph.neighbors[part]].tolist()):  # each is one of them
            mine = kept[crystal.site[graph.neighbors[part]] == end]
            if not np.allclose(mine, theirs[ends == end][: len(mine)], atol=3e-5):
                return False
    return True


@pytest.mark.filterwarnings("ignore")  # pymatgen warns while it makes some of these
def test_crystals(deep, tally, encoder):
    several = st.lists(good_crystals() | good_crystals() | bad_crystals(), min_size=1, max_size=5)

    @given(several)
    def check(drawn):
        values = [crystal.given for crystal in drawn]
        featurizer = polysrl_dc.StructureGraphFeaturizer(on_error="skip")

        with tally.inputs(len(drawn)):
            dataset, good = check_rows(
                featurizer, values, tally,
                lambda row, graph: is_right(drawn[row], graph),
                lambda row, message: drawn[row].cell is None and len(message) > 10,
            )  # fmt: skip
            if good:
                embedding = encoder.predict_structure_embedding(dataset)
                assert len(embedding) == len(good)
                np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)

    draw(check, deep, few=30, many=1000)


HYDROGEN = [1, 1]


@pytest.mark.parametrize(
    ("lattice", "words"),
    [
        (2000 * np.eye(3), "box"),  # seven gigabytes and a minute, before it was refused
        ([[3, 0, 0], [3e5, 3, 0], [-1.5e5, 3e5, 3]], None),  # no end
        ([[3, 0, 0], [3e7, 3, 0], [-1.5e7, 3e7, 3]], "above 1e"),
    ],
)
def test_cells_whose_search_would_not_end(lattice, words):
    structure = Structure(Lattice(lattice), HYDROGEN, [[0, 0, 0], [0.5, 0.5, 0.5]])
    featurizer = polysrl_dc.StructureGraphFeaturizer()
    if words is None:
        graph = featurizer.featurize(structure)[0]
        expected = neighbors(3 * np.eye(3), np.array([[0, 0, 0], [0.5, 0.5, 0.5]]))
        np.testing.assert_allclose(graph.distances, np.tile(expected[0][0][:12], 2), atol=1e-4)
    else:
        with pytest.raises(InvalidInputError, match=words):
            featurizer.featurize(structure)


@pytest.mark.filterwarnings("ignore")
def test_crystals_in_a_dataset(deep, tally, tmp_path):
    """The packed cache keeps the ids of the good ones and names the others."""

    @given(st.lists(good_crystals() | bad_crystals(), min_size=1, max_size=6))
    def check(drawn):
        values = [crystal.given for crystal in drawn]
        bad = [str(row) for row, crystal in enumerate(drawn) if crystal.cell is None]
        with tally.inputs(len(drawn)):
            if len(bad) == len(drawn):
                with pytest.raises(InvalidInputError, match="none of the"):
                    polysrl_dc.PolymorphDataset(values, on_error="skip", progress=False)
                tally.refused(len(bad))
                return
            dataset = polysrl_dc.PolymorphDataset(
                values, on_error="skip", progress=False, cache_dir=tmp_path, processes=1
            )
            assert [name for name, _ in dataset.skipped] == bad
            good = [row for row in range(len(drawn)) if str(row) not in bad]
            assert dataset.ids.tolist() == [str(row) for row in good]
            for row, graph in zip(good, dataset.X, strict=True):
                assert is_right(drawn[row], graph)
            if bad:
                with pytest.raises(InvalidInputError, match=f"^structure {bad[0]}: "):
                    polysrl_dc.PolymorphDataset(
                        values, progress=False, cache_dir=tmp_path, processes=1
                    )
            tally.refused(len(bad))
            tally.right(len(good))

    draw(check, deep, few=4, many=60)
