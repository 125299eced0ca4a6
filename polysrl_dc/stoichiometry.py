"""Chemical formula -> atomic numbers and amounts; pure functions, no DeepChem and no torch."""

import re
from collections.abc import Mapping
from functools import cache
from math import gcd

import numpy as np
from pymatgen.core import Composition, DummySpecies, Element, Species

from polysrl_dc.elements import has_embedding
from polysrl_dc.errors import InvalidInputError

_SYMBOL = re.compile(r"[A-Z][a-z]?")
_NUMBER = re.compile(r"\d+\.?\d*|\.\d+")
_PLAIN = re.compile(r"(?:[A-Z][a-z]?(?:\d+(?:\.\d+)?)?)+")  # no brackets, dots or spaces
_PLAIN_PART = re.compile(r"([A-Z][a-z]?)(\d+(?:\.\d+)?)?")
_SIGNED = re.compile(r"[+-]")
ISOTOPES = frozenset({"D", "T"})  # pymatgen reads them as elements of their own with symbol H
_GREATEST_AMOUNT = 1e9  # atoms of one element per formula


def parse_formula(value: str | Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Read a formula into atomic numbers and amounts.

    Parameters
    ----------
    value : str, pymatgen Composition or mapping of symbol to amount
        The formula, e.g. ``"Fe2O3"``, ``"Ca(OH)2"``, ``{"Fe": 2, "O": 3}``. Amounts need not be
        integers nor add up to anything. Oxidation states are dropped.

    Returns
    -------
    numbers : numpy.ndarray, shape (n_elements,), uint8
        Atomic numbers, ascending, each once.
    amounts : numpy.ndarray, shape (n_elements,), float64
        Amounts as written, in atoms per formula; every one is positive and finite.

    Raises
    ------
    InvalidInputError
        Not a formula: empty, not a number where an amount should be, zero or negative amounts,
        charges, isotopes (``D``), dummy species (``Xx2O3``), elements without an embedding.

    Examples
    --------
    >>> numbers, amounts = parse_formula("Fe2O3")
    >>> numbers.tolist(), amounts.tolist()
    ([8, 26], [3.0, 2.0])
    """
    plain = _plain_amounts(value) if isinstance(value, str) else None
    totals = _checked_amounts(value) if plain is None else plain
    numbers = sorted(totals)
    return np.array(numbers, dtype=np.uint8), np.array([totals[z] for z in numbers])


def _checked_amounts(value: object) -> dict[int, float]:
    """Amounts by atomic number of whatever pymatgen reads as a composition."""
    totals: dict[int, float] = {}
    for symbol, amount in _amounts(value).items():
        if isinstance(symbol, DummySpecies):
            raise InvalidInputError(f"formula {value!r}: {symbol.symbol} is not a chemical element")
        element = symbol.element if isinstance(symbol, Species) else symbol
        if element.name in ISOTOPES:
            raise InvalidInputError(
                f"formula {value!r}: isotope {element.name} has no embedding; write H"
            )
        if not 0 < amount <= _GREATEST_AMOUNT:
            raise InvalidInputError(
                f"formula {value!r}: the amount of {element.symbol} is {amount}, "
                f"must be positive and at most {_GREATEST_AMOUNT:g}"
            )
        if not has_embedding()[element.Z]:
            raise InvalidInputError(f"formula {value!r}: element {element.symbol} has no embedding")
        totals[element.Z] = totals.get(element.Z, 0.0) + float(amount)
    if not totals:
        raise InvalidInputError(f"formula {value!r} holds no element")
    return totals


@cache
def _usable_symbols() -> dict[str, int]:
    """Symbol -> atomic number, of the elements with an embedding."""
    return {Element.from_Z(z).symbol: z for z in range(1, 119) if has_embedding()[z]}


def _plain_amounts(text: str) -> dict[int, float] | None:
    """Amounts by atomic number of a formula such as Fe2O3; None leaves it to pymatgen, and errors.

    The same result, in a tenth of the time.
    """
    if len(text) > 100 or not _PLAIN.fullmatch(text):
        return None
    usable = _usable_symbols()
    totals: dict[int, float] = {}
    for symbol, number in _PLAIN_PART.findall(text):
        z, amount = usable.get(symbol), float(number or 1)
        if z is None or not 0 < amount <= _GREATEST_AMOUNT:
            return None
        totals[z] = totals.get(z, 0.0) + amount
    return totals if max(totals.values()) <= _GREATEST_AMOUNT else None


def _amounts(value: object) -> dict:
    """Species or element -> amount, before any check of the amounts themselves."""
    if isinstance(value, Composition):
        return dict(value.items())
    try:
        if isinstance(value, str):
            return _amounts_of_string(value)
        if isinstance(value, Mapping):
            symbols = [next(iter(Composition({key: 1}))) for key in value]
            if len(set(symbols)) < len(value):
                raise InvalidInputError(f"formula {value!r}: an element is named twice")
            return dict(zip(symbols, (float(amount) for amount in value.values()), strict=True))
    except InvalidInputError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InvalidInputError(f"{value!r} is not a chemical formula: {error}") from error
    raise InvalidInputError(
        f"{value!r} of type {type(value).__name__} is not a formula: "
        "expected a string, a pymatgen Composition or a mapping of symbol to amount"
    )


def _amounts_of_string(text: str) -> dict:
    if len(text) > 1000:
        raise InvalidInputError(f"formula {text[:40]!r}... is {len(text)} characters long")
    if not text.strip():
        raise InvalidInputError("the formula is empty")
    if _SIGNED.search(text):
        raise InvalidInputError(f"formula {text!r}: signs and charges are not supported")
    composition = Composition(text)
    # pymatgen drops elements whose amount is zero; they are an error here, not a silent change
    kept = {el.name if isinstance(el, Element) else el.symbol for el in composition}
    dropped = set(_SYMBOL.findall(text)) - kept
    if dropped:
        raise InvalidInputError(f"formula {text!r}: the amount of {sorted(dropped)[0]} is zero")
    if any(float(number) == 0 for number in _NUMBER.findall(text)):
        raise InvalidInputError(f"formula {text!r}: an amount is zero")
    return dict(composition.items())


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
        pymatgen's reduced formula of the integer formula, or its formula of the fractions.

    Examples
    --------
    >>> reduced_formula(np.array([8, 26]), np.array([6.0, 4.0]))
    'Fe2O3'
    >>> reduced_formula(np.array([8, 26]), np.array([0.6, 0.4]))
    'Fe2O3'
    """
    composition = Composition(
        {Element.from_Z(z): a for z, a in zip(numbers.tolist(), amounts.tolist(), strict=True)}
    )
    rounded = np.rint(amounts)
    if np.array_equal(rounded, amounts):
        divisor = gcd(*rounded.astype(np.int64).tolist())
        return (composition / divisor).reduced_formula
    formula = composition.get_integer_formula_and_factor(max_denominator=10_000)[0]
    if len(Composition(formula)) < len(composition):  # a trace below the greatest denominator
        return composition.fractional_composition.formula
    return formula
