"""Formulas in every form users write them, and every form of bad input."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Composition, Element

from polysrl_dc.errors import InvalidInputError
from polysrl_dc.stoichiometry import parse_formula, reduced_formula

GOOD: list[tuple[Any, dict]] = [
    ("Fe2O3", {"Fe": 2, "O": 3}),
    (" NaCl\n", {"Na": 1, "Cl": 1}),
    ("Ca(OH)2", {"Ca": 1, "O": 2, "H": 2}),
    ("K4[Fe(CN)6]", {"K": 4, "Fe": 1, "C": 6, "N": 6}),
    ("Hg0.7Cd0.3Te", {"Hg": 0.7, "Cd": 0.3, "Te": 1}),
    ("Ti1.5C2Hf0.5", {"Ti": 1.5, "C": 2, "Hf": 0.5}),
    ("Cs2.5C2Hg2", {"Cs": 2.5, "C": 2, "Hg": 2}),
    ("Fe1.5H2Os", {"Fe": 1.5, "H": 2, "Os": 1}),
    ("CH3CH2OH", {"C": 2, "H": 6, "O": 1}),
    ("NaN", {"Na": 1, "N": 1}),
    ("Xe", {"Xe": 1}),
    (np.str_("MgO"), {"Mg": 1, "O": 1}),
    ({"Fe": 2, "O": 3}, {"Fe": 2, "O": 3}),
    ({"Fe2+": 1, "Fe3+": 2, "O2-": 4}, {"Fe": 3, "O": 4}),
    ({26: 2, 8: np.float32(3)}, {"Fe": 2, "O": 3}),
    ({Element("Na"): 1, "Cl": "1"}, {"Na": 1, "Cl": 1}),
    (
        {
            "Ga": 1.0,
            "@module": "pymatgen.core.composition",
            "@class": "Composition",
            "@version": None,
        },
        {"Ga": 1},
    ),
    (Composition("LiFePO4"), {"Li": 1, "Fe": 1, "P": 1, "O": 4}),
    (Composition({"Fe2+": 1, "Fe3+": 2, "O2-": 4}), {"Fe": 3, "O": 4}),
]

BAD: list[Any] = [
    "", " ", "nan", "Xx2O3", "X", "Fe2Q3", "Rf", "RfO2", "fe2o3", "2H2O", "123", "Fe2..O3",
    "MgCl2.6NH3", "PbI2.2CH3NH2", "ZnCl2.2(NH3)", "AlCl3.3C2H5OH", "Fe2O3\nTiO2", "TIO2",
    "(Fe2O3", "Fe2O3)", "Fe2O3!", "CuSO4*5H2O", "GaAs0.1P0.9G1128", "Fe-2O3", "Fe0O3",
    "Fe0Fe2O3", "Fe2O0.0", "Fe(OH)0", "Fe3+", "SO4^2-", "D2O", "T2O",
    "H" * 10_000, "NaCl" * 2_500, "(" * 5_000,
    "H" + "1" + "0" * 30 + "O",
    float("nan"), None, 3.5, 5, True, b"Fe2O3", ["Fe2O3"], np.array([1.0]), pd.NA,
    {"Fe": 1, "@class": "Structure"},
    {}, {"": 1}, {None: 1}, {"Xx": 1}, {"FeO": 1}, {"Rf": 1}, {"D": 2, "O": 1}, {500: 1},
    {"Fe": 0, "O": 1}, {"Fe": -1, "O": 2}, {"Fe": float("nan")}, {"Fe": float("inf")}, {"Fe": None},
    {"Fe": "many"}, {"Fe": 1, 26: 1}, {"Fe": 1e300, "O": 1e300},
    Composition({}), Composition("Xx2O3"), Composition("D2O"), Composition("Rf"),
    Composition({"Fe": -1}, allow_negative=True),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), GOOD, ids=lambda value: repr(value)[:30])
def test_formulas(value, expected):
    numbers, amounts = parse_formula(value)
    assert numbers.dtype == np.uint8 and amounts.dtype == np.float64
    assert (np.diff(numbers.astype(int)) > 0).all()
    assert dict(zip(numbers.tolist(), amounts.tolist(), strict=True)) == {
        Element(symbol).Z: amount for symbol, amount in expected.items()
    }


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:30])
def test_bad_formulas_end_in_the_one_exception_and_a_short_message(value):
    with pytest.raises(InvalidInputError) as caught:
        parse_formula(value)
    assert 10 < len(str(caught.value)) < 300


def test_messages_name_the_value_and_what_is_wrong():
    cases: list[tuple[Any, str]] = [
        ("Xx2O3", "Xx2O3.*not a chemical element"),
        ("RfO2", "RfO2.*Rf has no embedding"),
        ("Fe0O3", "Fe0O3.*amount of Fe is zero"),
        ("SrTi03", "amount of Ti is 03: is its 0 meant as oxygen"),
        ("D2O", "D2O.*isotope D"),
        ({"Fe": -1.5}, "-1.5, must be positive"),
        (3.5, "3.5 of type float"),
        ("La1-xSrxMnO3", "a number for the x"),
        ("Mg3Sb2-\u03b4", "a number for the x or \u03b4"),
        ("SrTiO\u2083\u208b\u03b4", "a number for the x or \u03b4"),
        ("\u03b1-Fe2O3", "leave out the phase"),
        ("\u03b4-Bi2O3", "leave out the phase"),
        ("beta-Ga2O3", "leave out the phase"),
        ("4H-SiC", "leave out the phase"),
        ("Ti-6Al-4V", "each amount in atoms, behind its element"),
        ("Fe80%B20%", "each amount in atoms"),
        ("Zr41,2Ti58,8", "decimals with a point"),
        ("Pb(Mg1/3Nb2/3)O3", "fractions as decimals"),
        ("Bi_2Te_3", "plain digits, without markup"),
        ("Fe2\u041e3", "another script"),
        ("0.5Bi2Te3", r"begins with a number: write 2H2O as \(H2O\)2"),
        ("CuSO4\u00b75H2O", "write a hydrate as"),
        ("Cu2Se*", r"cannot read '\*'"),
        ("SO4^2-", "signs and charges"),
        ("Fe\u00b3\u207a", "signs and charges"),
        ("TiO\u00b2", "cannot read"),
    ]
    for value, words in cases:
        with pytest.raises(InvalidInputError, match=words):
            parse_formula(value)


def test_order_of_the_elements_does_not_matter(random_formulas):
    for symbols, amounts in random_formulas:
        backwards = "".join(f"{s}{a:g}" for s, a in zip(symbols[::-1], amounts[::-1], strict=True))
        forwards = dict(zip(symbols, amounts, strict=True))
        for one, other in zip(parse_formula(forwards), parse_formula(backwards), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.fixture(name="random_formulas")
def _random_formulas():
    generator = np.random.default_rng(0)
    symbols = [Element.from_Z(z).symbol for z in range(1, 104)]
    return [
        (list(generator.choice(symbols, n, replace=False)), generator.integers(1, 999, n) / 10)
        for n in generator.integers(1, 8, 50)
    ]


@pytest.mark.parametrize(
    "group",
    [
        ["Hg0.7Cd0.3Te", "Hg7Cd3Te10", {"Te": 1, "Cd": 0.3, "Hg": 0.7}, "Te100Cd30Hg70"],
        ["Fe2O3", "Fe4O6", "O3Fe2", "Fe0.4O0.6", {"Fe3+": 2, "O2-": 3}],
        ["O2", "O", "O3", {"O": 0.25}],
        ["Fe2O3", {"Fe": 2e-5, "O": 3e-5}],
        ["Ca(OH)2", "CaO2H2", "H2CaO2", "Ca(OH)₂", "CaO₂H2"],
        ["Hg0.7Cd0.3Te", "Hg₀.₇Cd₀.₃Te", "Hg₇Cd₃Te₁₀"],
    ],
)
def test_equal_stoichiometries_share_one_key(group):
    assert len({reduced_formula(*parse_formula(formula)) for formula in group}) == 1


@pytest.mark.parametrize(
    "formula",
    [
        "Fe4O6",
        "Ho0.02Nb2Sb",
        {"Si": 0.99999, "P": 1e-5},
        {"O": 1, "Co": 1e-8},
        "Ca(OH)2",
        "O3",
        "Ga0.25As0.25B0.0000000075",
    ],
)
def test_a_key_is_a_formula_that_has_this_key(formula):
    key = reduced_formula(*parse_formula(formula))
    assert reduced_formula(*parse_formula(key)) == key


@pytest.mark.parametrize(
    "group",
    [
        ["Fe2O3", "Fe3O4", "FeO"],
        ["Hg0.7Cd0.3Te", "Hg0.71Cd0.29Te"],
        ["O", {"O": 1, "Fe": 1e-5}, {"O": 1, "Co": 1e-5}],
        [{"O": 1, "Fe": 1.0001e-9}, {"O": 1, "Fe": 1.0002e-9}],
        ["CO", "Co"],
    ],
)
def test_different_stoichiometries_have_different_keys(group):
    assert len({reduced_formula(*parse_formula(formula)) for formula in group}) == len(group)


def formula_columns(data_dir):
    wetlab = {
        "expt_gap.csv": "formula",
        "expt_formation_enthalpy.csv": "formula",
        "metallic_glass_trg.csv": "Material compositions",
        "estm.csv": "Formula",
    }
    for name, column in wetlab.items():
        yield pd.read_csv(data_dir / "wetlab" / name)[column]
    for path in sorted((data_dir / "matbench").glob("matbench_*.csv.gz")):
        yield pd.read_csv(path, usecols=["composition"])["composition"]


def test_real_formulas_parse_as_pymatgen_reads_them_but_the_one_malformed(data_dir):
    formulas = [
        formula
        for column in formula_columns(data_dir)
        for formula in column.sample(min(len(column), 1500), random_state=0)
    ]
    formulas.append("GaAs0.1P0.9G1128")
    refused = set()
    for formula in set(formulas):
        try:
            numbers, amounts = parse_formula(formula)
        except InvalidInputError:
            refused.add(formula)
            continue
        expected = {element.Z: amount for element, amount in Composition(formula).items()}
        assert dict(zip(numbers.tolist(), amounts.tolist(), strict=True)) == pytest.approx(expected)
        key = reduced_formula(numbers, amounts)
        assert reduced_formula(*parse_formula(key)) == key
    assert len(formulas) > 10_000
    assert refused == {"GaAs0.1P0.9G1128"}


def test_the_real_measured_gaps_hold_exactly_one_malformed_row(data_dir):
    column = pd.read_csv(data_dir / "wetlab" / "expt_gap.csv")["formula"]
    refused = []
    for formula in column:
        try:
            parse_formula(formula)
        except InvalidInputError:
            refused.append(formula)
    assert refused == ["GaAs0.1P0.9G1128"]
