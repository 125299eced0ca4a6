"""Formulas that hypothesis draws together with what they are, and what is no formula."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import strategies as st
from pymatgen.core import Composition, Element

SYMBOLS = [Element.from_Z(z).symbol for z in range(1, 119)]
USABLE = SYMBOLS[:103]  # H to Lr have an embedding


@dataclass(frozen=True)
class Formula:
    """What is given, and how much of each element it holds; ``None`` where it has to be refused."""

    given: Any
    amounts: Mapping[str, Fraction] | None

    @property
    def numbers(self) -> list[int]:
        return sorted(SYMBOLS.index(symbol) + 1 for symbol in self.amounts or ())

    @property
    def fractions(self) -> np.ndarray:
        """In the order of ``numbers``."""
        exact = [self.amounts[SYMBOLS[z - 1]] for z in self.numbers]
        return np.array([float(amount / sum(exact)) for amount in exact])


INTEGERS = st.integers(1, 40).map(str) | st.sampled_from(["1000000", "100", "1"])
DECIMALS = st.sampled_from(["0.5", ".25", "3.", "1.125", "0.000000000001", "0.333333"])
AMOUNTS = st.just("") | INTEGERS | DECIMALS
SPACES = st.sampled_from(["", "", "", " ", "  ", "\t"])


def _fraction(written: str) -> Fraction:
    return Fraction(f"0{written}0" if "." in written else written or "1")


def _join(parts: list[tuple[str, dict[str, Fraction]]]) -> tuple[str, dict[str, Fraction]]:
    totals: dict[str, Fraction] = {}
    for _, amounts in parts:
        for symbol, amount in amounts.items():
            totals[symbol] = totals.get(symbol, Fraction(0)) + amount
    return "".join(text for text, _ in parts), totals


def _group(kind: str, inner: tuple, written: str) -> tuple[str, dict[str, Fraction]]:
    text, amounts = inner
    factor = _fraction(written)
    return f"{kind[0]}{text}{kind[1]}{written}", {s: a * factor for s, a in amounts.items()}


def written(symbols: list[str] = USABLE) -> st.SearchStrategy[Formula]:
    """Formulas as text, with brackets in brackets, spaces and amounts of every size."""
    element = st.builds(
        lambda symbol, space, amount, end: (
            f"{symbol}{space}{amount}{end}",
            {symbol: _fraction(amount)},
        ),
        st.sampled_from(symbols),
        SPACES,
        AMOUNTS,
        SPACES,
    )
    groups = st.recursive(
        element,
        lambda inner: st.builds(
            _group,
            st.sampled_from(["()", "[]", "{}"]),
            st.lists(inner, min_size=1, max_size=3).map(_join),
            AMOUNTS,
        ),
        max_leaves=6,
    )
    parts = st.lists(groups, min_size=1, max_size=4).map(_join)
    return parts.map(lambda part: Formula(part[0], _possible(part[1])))


def _possible(amounts: dict[str, Fraction]) -> dict[str, Fraction] | None:
    return amounts if max(amounts.values()) <= 10**9 else None


def mappings() -> st.SearchStrategy[Formula]:
    """Formulas as dicts and Compositions, with amounts of many types from 1e-12 to 1e6."""
    amount = st.sampled_from([1, 2, 3, 0.5, 0.25, 1e-12, 1e6, 7, 12.75]) | st.integers(1, 999)
    exact = st.dictionaries(st.sampled_from(USABLE), amount, min_size=1, max_size=8)

    def formula(amounts: dict, key: Callable, value: Callable, whole: Callable) -> Formula:
        given = whole({key(symbol): value(amount) for symbol, amount in amounts.items()})
        return Formula(given, {s: Fraction(float(value(a))) for s, a in amounts.items()})

    keys = [str, Element, lambda s: SYMBOLS.index(s) + 1, lambda s: f"{s}2+", lambda s: f"{s}0+"]
    values = [float, np.float32, np.float64, str, Fraction]
    any_type = st.builds(
        formula, exact, st.sampled_from(keys), st.sampled_from(values), st.just(dict)
    )
    composition = st.builds(formula, exact, st.just(str), st.just(float), st.just(Composition))
    large = composition.filter(lambda f: min(f.amounts.values()) > 1e-8)  # others it drops
    return any_type | large


SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"
_MIXED = re.compile(f"[0-9][{SUBSCRIPTS}]|[{SUBSCRIPTS}][0-9]")
NOT_IN_FORMULAS = (
    "^_!@#$%&/\\|~`'\"<>?;:,=*+-xyz\x00\u00b2\u00b7\u0394\u03b4\u0430\u200b\u2022\u207a\u2082\u2212\u2219"
    "\u22c5\U0001f701"  # digits and signs above and below the line, dots, other alphabets
)
HYDRATES = [
    "CuSO4{}5H2O", "MgCl2{}6H2O", "NaCl{}2H2O", "CaSO4{}2(H2O)", "Al2O3{}2SiO2", "NaCl{}2NaF",
    "CuSO4{}5H2O ", "Mg Cl2{}6 H2O", "KAl(SO4)2{}12H2O", "CuSO4{}5 H 2 O",
]  # fmt: skip
NO_FORMULAS = [
    None, float("nan"), float("inf"), 0, 5, -1.5, True, "", " ", "\n", b"NaCl", [], ["NaCl"], {},
    np.nan, np.float32(2), ("Na", "Cl"), object, "nan", "None", "D2O", "T", "DCl", "Xx2O3", "X",
    "Q", "Vac", "()", "NaCl()", "Na(Cl", "NaCl)2", "(Na]Cl", "(2)Na", "2NaCl", "Na0Cl", "NaCl0.0",
    "(NaCl)0", "Ti02", "(NaCl)03", "Na00.5Cl", "NaCl.", "Na..5Cl", "Na1.2.3",
    "Na1e3", "Na1₂", "Na₂1", "Na₀", "NaCl²", "₂Na", "NaCl+", "Na+", "SO4^2-", "SO4 2-", "SO42-",
    "nacl", "na2o", "NA2O", "Uue", "Bk(", "H" * 10_000, "NaCl" * 2_500, "(" * 10_000,
    "(" * 500 + "Na" + ")" * 500, "Na" + "9" * 400, "Na0." + "0" * 400 + "1", "Fe2000000000",
    {"Na": 0}, {"Na": -1, "Cl": 2}, {"Na": float("nan")}, {"Na": None}, {"Na": [1]}, {"Na": 1e10},
    {"Fe2": 1, "O3": 1}, {"NaCl": 1}, {"D": 2, "O": 1}, {"Xx": 1}, {"Og": 1}, {True: 1}, {1.5: 2},
    {"Na": 1, 11: 1}, {"": 1}, {None: 1}, {10**400: 1}, {"Na": 10**400}, Composition("Og"),
    Composition({}), Composition("D2O"), Composition({"Na": -1}, allow_negative=True),
]  # fmt: skip


def _with_character(formula: Formula, character: str, place: int) -> Formula:
    text = formula.given
    place %= len(text) + 1
    return Formula(text[:place] + character + text[place:], None)


def bad_formulas() -> st.SearchStrategy[Formula]:
    """What is no formula, what may be two, and elements that have no embedding."""
    unusable = st.sampled_from(SYMBOLS[103:])
    return st.one_of(
        st.sampled_from(NO_FORMULAS).map(lambda given: Formula(given, None)),
        st.builds(
            _with_character, written(), st.sampled_from(NOT_IN_FORMULAS), st.integers(0, 99)
        ).filter(lambda formula: read(formula.given) is None),
        st.builds(
            lambda text, dot: Formula(text.format(dot), None),
            st.sampled_from(HYDRATES),
            st.sampled_from([".", "·", "•", "*", "⋅", " · ", ". "]),
        ),
        st.builds(
            lambda f, symbol, amount: Formula(f"{f.given}{symbol}{amount}", None),
            written(), unusable, AMOUNTS,
        ),
    )  # fmt: skip


def any_text() -> st.SearchStrategy[Formula]:
    """Text of the characters of formulas, and any other; :func:`read` says what it means."""
    like = st.text("NaClFeOHBS()[]{}0123456789. ₀₁₂₅", max_size=14)
    return (like | st.text(max_size=12)).map(lambda text: Formula(text, read(text)))


def formulas() -> st.SearchStrategy[Formula]:
    """Any of the above."""
    return st.one_of(written(), mappings(), bad_formulas(), any_text())


def read(text: str) -> dict[str, Fraction] | None:
    """What a formula means, read letter by letter; None if it means nothing that is usable."""

    def skip(at: int) -> int:
        while at < len(text) and text[at].isspace():
            at += 1
        return at

    def number(at: int) -> tuple[Fraction, int]:
        start = at = skip(at)
        while at < len(text) and text[at] in "0123456789.":
            at += 1
        before_dot = text[start:at].partition(".")[0]
        if before_dot.startswith("0") and len(before_dot) > 1:
            raise ValueError(before_dot)
        return _fraction(text[start:at]), at

    def sequence(at: int, end: str) -> tuple[dict[str, Fraction], int]:
        parts = []
        while (at := skip(at)) < len(text) and text[at] not in ")]}":
            if text[at] in "([{":
                inner, at = sequence(at + 1, ")]}"["([{".index(text[at])])
                at += 1
            else:
                size = 2 if text[at + 1 : at + 2].islower() and text[at + 1] < "{" else 1
                symbol, at = text[at : at + size], at + size
                if symbol not in USABLE:
                    raise ValueError(symbol)
                inner = {symbol: Fraction(1)}
            amount, at = number(at)
            if not 0 < amount:
                raise ValueError("zero")
            parts.append(("", {symbol: a * amount for symbol, a in inner.items()}))
        if text[at : at + 1] != end or not parts:
            raise ValueError(end)
        return _join(parts)[1], at

    for digit in text if _MIXED.search(text) is None else "":
        if digit in SUBSCRIPTS:
            text = text.replace(digit, str(SUBSCRIPTS.index(digit)))
    try:
        amounts, at = sequence(0, "")
    except ValueError:
        return None
    return _possible(amounts) if at == len(text) <= 1000 else None
