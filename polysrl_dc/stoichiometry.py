"""Chemical formula -> atomic numbers and amounts; pure functions, no DeepChem and no torch."""

import re
from collections.abc import Mapping
from functools import cache
from math import gcd
from typing import Any, NoReturn

import numpy as np
from pymatgen.core import Composition, DummySpecies, Element, Species
from pymatgen.core.periodic_table import get_el_sp

from polysrl_dc.elements import has_embedding
from polysrl_dc.errors import InvalidInputError

# An element or a bracket, then its amount; possessive, so that nothing is read in a second way.
_TOKEN = re.compile(r"([A-Z][a-z]?+|[()\[\]{}])\s*+([0-9]*+\.?+[0-9]*+)\s*+")
_FORMULA = re.compile(rf"(?:{_TOKEN.pattern})++")
_OPENING = {")": "(", "]": "[", "}": "{"}
_DECIMAL = r"(?<!(?<![0-9])0)\.[0-9]+"  # with a dot that may be no decimal point, unlike 0.5
_LIGAND = re.compile(rf"{_DECIMAL}[(\[]?(?:H2O|OH2|NH3|N2H4|CH3|C[2-9]H)(?![a-z])")
_ONE_DOT = re.compile(rf"([^.]+){_DECIMAL}([^.]+)")
_ZERO_FIRST = re.compile("0[0-9]")  # Ti02, typed for TiO2
_KEY = re.compile(r"[A-Z][a-z]?([0-9]*\.?[0-9]*[+-])?(,.*)?|[0-9]+")  # Fe, Fe2+, 26; not Fe2
_MONTY = ("@module", "@class", "@version")  # what matminer stores beside the amounts
_SUBSCRIPTS = str.maketrans({0x2080 + digit: str(digit) for digit in range(10)})
_LINE_END = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_MIXED = re.compile("[0-9][\u2080-\u2089]|[\u2080-\u2089][0-9]")
#: What to do about a formula that cannot be read -> how it looks; the first that fits is told.
_UNREADABLE = {
    "it has several lines": _LINE_END,
    "plain digits stand beside subscripts": _MIXED,
    "a letter is of another script, though it may look Latin": re.compile(
        r"[^\W\d_A-Za-z\u0370-\u03ff\u00b2\u00b3\u00b9\u2070-\u209c]"
    ),
    "write a number for the x or \u03b4 of an amount": re.compile(
        "[-+\u2212\u208a\u208b] ?[dmnxyz\u03b4\u03b5](?![a-z])|(?<!^)\u03b4"
    ),
    "leave out the phase before it": re.compile("^(?:[\u0370-\u03ff]|[a-z]+-|[0-9]+[A-Z]-).*[A-Z]"),
    "it begins with a number: write 2H2O as (H2O)2": re.compile(r"^[0-9.]+ ?[A-Z(\[{]"),
    "write each amount in atoms, behind its element": re.compile("%|[A-Z][a-z]?-[0-9.]+[A-Z]"),
    "write decimals with a point": re.compile("[0-9],[0-9]"),
    "write fractions as decimals": re.compile("[0-9]/[0-9]"),
    "write amounts as plain digits, without markup": re.compile("[_~$<>]"),
    "write a hydrate as CuSO4(H2O)5": re.compile("[*\u00b7\u2022\u2219\u22c5] ?[0-9A-Z(]"),
    "signs and charges are not supported": re.compile("[-+\u2212\u207a\u207b\u208a\u208b]"),
}
ISOTOPES = frozenset({"D", "T"})  # pymatgen reads them as elements of their own with symbol H
_GREATEST_AMOUNT = 1e9  # atoms of one element per formula
_TRACE = 1e-8  # amount below which pymatgen loses an element


def parse_formula(value: str | Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Read a formula into atomic numbers and amounts.

    Parameters
    ----------
    value : str, pymatgen Composition or mapping of symbol to amount
        The formula, e.g. ``"Fe2O3"``, ``"Fe₂O₃"``, ``"Ca(OH)2"``, ``{"Fe": 2, "O": 3}``. Amounts
        need not be integers nor add up to anything. Oxidation states in a mapping are dropped. A
        mapping may be a Composition as monty writes it to JSON.

    Returns
    -------
    numbers : numpy.ndarray, shape (n_elements,), uint8
        Atomic numbers, ascending, each once.
    amounts : numpy.ndarray, shape (n_elements,), float64
        Amounts as written, in atoms per formula; every one is positive and finite.

    Raises
    ------
    InvalidInputError
        Not a formula: empty, not a number where an amount should be, zero or negative amounts, a
        zero typed for oxygen (``Ti02``), charges, isotopes (``D``), dummy species (``Xx2O3``),
        elements without an embedding; or a formula of two meanings (``CuSO4.5H2O``; write
        ``CuSO4(H2O)5``).

    Examples
    --------
    >>> numbers, amounts = parse_formula("Fe2O3")
    >>> numbers.tolist(), amounts.tolist()
    ([8, 26], [3.0, 2.0])
    """
    if not isinstance(value, str | Mapping):
        raise InvalidInputError(
            f"{value!r:.80} of type {type(value).__name__} is not a formula: "
            "expected a string, a pymatgen Composition or a mapping of symbol to amount"
        )
    try:
        totals = _of_string(value) if isinstance(value, str) else _of_mapping(value)
        for z, amount in totals.items():
            if not 0 < amount <= _GREATEST_AMOUNT:
                _refuse_amount(Element.from_Z(z).symbol, amount)
    except InvalidInputError as error:
        raise InvalidInputError(f"formula {value!r:.80}: {error}") from error
    numbers = sorted(totals)
    return np.array(numbers, dtype=np.uint8), np.array([totals[z] for z in numbers])


def _of_string(text: str) -> dict[int, float]:
    """Amounts by atomic number of a formula with brackets of any kind and depth."""
    if len(text) > 1000:
        raise InvalidInputError(f"{len(text)} characters, more than 1000")
    given = text.strip()
    text = given if _MIXED.search(given) else given.translate(_SUBSCRIPTS)
    if not _FORMULA.fullmatch(text) or _LINE_END.search(text):
        raise InvalidInputError(_why_unreadable(text))
    if "." in text and _may_be_an_adduct(text):
        raise InvalidInputError("its dot may be a decimal point or that of CuSO4(H2O)5")
    usable = _usable_symbols()
    totals: dict[int, float] = {}
    opened: list[tuple[str, dict[int, float]]] = []
    for token, written in _TOKEN.findall(text):
        if token in "([{":
            if written:
                raise InvalidInputError(f"{written} follows {token}")
            opened.append((token, totals))
            totals = {}
            continue
        amount = _amount(token, written)
        if token not in _OPENING:
            z = usable.get(token) or _refuse(token)
            totals[z] = totals.get(z, 0.0) + amount
            continue
        if not opened or opened[-1][0] != _OPENING[token]:
            raise InvalidInputError(f"{token} closes nothing")
        if not totals:
            raise InvalidInputError(f"{_OPENING[token]}{token} holds no element")
        group, (_, totals) = totals, opened.pop()
        for z, inner in group.items():
            totals[z] = totals.get(z, 0.0) + inner * amount
    if opened:
        raise InvalidInputError(f"{opened[-1][0]} is not closed")
    return totals


def _amount(token: str, written: str) -> float:
    if not written:
        return 1.0
    try:
        amount = float(written)
    except ValueError:
        raise InvalidInputError(f"the amount of {token} is {written}") from None
    if amount == 0:
        raise InvalidInputError(f"the amount of {token} is zero")
    if _ZERO_FIRST.match(written):
        raise InvalidInputError(f"the amount of {token} is {written}: is its 0 meant as oxygen, O?")
    return amount


def _may_be_an_adduct(text: str) -> bool:
    """CuSO4.5H2O, NaCl.2NaF: a ligand after the dot, or an element on both its sides."""
    compact = "".join(text.split())
    parts = _ONE_DOT.fullmatch(compact)
    sides = [set(re.findall("[A-Z][a-z]?", side)) for side in parts.groups()] if parts else [set()]
    return bool(_LIGAND.search(compact) or set.intersection(*sides))


def _why_unreadable(text: str) -> str:
    if not text.strip():
        return "it is empty"
    for reason, characters in _UNREADABLE.items():
        if characters.search(text):
            return reason
    return f"cannot read {_TOKEN.sub('', text).strip()!r:.40}"


@cache
def _usable_symbols() -> dict[str, int]:
    """Symbol -> atomic number, of the elements with an embedding."""
    return {Element.from_Z(z).symbol: z for z in range(1, 119) if has_embedding()[z]}


def _refuse(symbol: str) -> NoReturn:
    if symbol in ISOTOPES:
        raise InvalidInputError(
            f"isotope {symbol} has no embedding; write H, or the element's second letter small (Ti)"
        )
    if Element.is_valid_symbol(symbol):
        raise InvalidInputError(f"element {symbol} has no embedding")
    raise InvalidInputError(f"{symbol} is not a chemical element")


def _of_mapping(value: Mapping) -> dict[int, float]:
    """Amounts by atomic number of a Composition or another mapping of symbol to amount."""
    kinds: set[Element | Species] = set()
    totals: dict[int, float] = {}
    if isinstance(value, dict) and value.get("@class") == "Composition":
        value = {key: given for key, given in value.items() if key not in _MONTY}
    for key, given in value.items():
        kind = _kind(key)
        if kind in kinds:
            raise InvalidInputError(f"{kind} is named twice")
        kinds.add(kind)
        try:
            amount = float(given)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidInputError(f"the amount of {kind} is {given!r:.40}") from error
        if not 0 < amount <= _GREATEST_AMOUNT:  # as well as the sum of Fe2+ and Fe3+
            _refuse_amount(str(kind), amount)
        name = kind.element.name if isinstance(kind, Species) else kind.name
        z = _usable_symbols().get(name) or _refuse(name)
        totals[z] = totals.get(z, 0.0) + amount
    if not totals:
        raise InvalidInputError("it holds no element")
    return totals


def _kind(key: Any) -> Element | Species:
    """The element or species that a key of a mapping names."""
    if isinstance(key, bool | np.bool_) or (isinstance(key, str) and not _KEY.fullmatch(key)):
        raise InvalidInputError(f"{key!r:.40} names no element")
    try:
        kind = get_el_sp(key)
    except (ValueError, TypeError, ArithmeticError, LookupError, SyntaxError) as error:
        raise InvalidInputError(f"{key!r:.40} names no element") from error
    if isinstance(kind, DummySpecies):
        raise InvalidInputError(f"{kind.symbol} is not a chemical element")
    return kind


def _refuse_amount(name: str, amount: float) -> NoReturn:
    raise InvalidInputError(
        f"the amount of {name} is {amount}, must be positive and at most {_GREATEST_AMOUNT:g}"
    )


def reduced_formula(numbers: np.ndarray, amounts: np.ndarray) -> str:
    """Reduced formula, the key under which polymorphs and repeated measurements are grouped.

    Parameters
    ----------
    numbers : numpy.ndarray, shape (n_elements,)
        Atomic numbers, each once.
    amounts : numpy.ndarray, shape (n_elements,)
        Positive amounts; non-integers are brought to integers with a denominator up to 10,000, or,
        where that would lose an element, to fractions.

    Returns
    -------
    str
        pymatgen's reduced formula of the integer formula, or a formula of the fractions.

    Examples
    --------
    >>> reduced_formula(np.array([8, 26]), np.array([6.0, 4.0]))
    'Fe2O3'
    >>> reduced_formula(np.array([8, 26]), np.array([0.6, 0.4]))
    'Fe2O3'
    """
    fractions = amounts / amounts.sum()
    if amounts.max() < 0.1:  # far from the smallest integer, where the denominators would end
        amounts = amounts / amounts.max()
    if min(fractions.min(), amounts.min()) < _TRACE:
        return _formula_of_fractions(numbers, fractions)
    composition = Composition(
        {Element.from_Z(z): a for z, a in zip(numbers.tolist(), amounts.tolist(), strict=True)}
    )
    rounded = np.rint(amounts)
    if np.array_equal(rounded, amounts):
        divisor = gcd(*rounded.astype(np.int64).tolist())
        return (composition / divisor).reduced_formula
    formula = composition.get_integer_formula_and_factor(max_denominator=10_000)[0]
    if len(Composition(formula)) < len(composition):  # a trace below the greatest denominator
        return _formula_of_fractions(numbers, fractions)
    return formula


def _formula_of_fractions(numbers: np.ndarray, fractions: np.ndarray) -> str:
    """Eight digits of each, and no exponents, so that it can be read again."""
    return " ".join(
        Element.from_Z(z).symbol + np.format_float_positional(f, 8, fractional=False, trim="-")
        for z, f in zip(numbers.tolist(), fractions.tolist(), strict=True)
    )
