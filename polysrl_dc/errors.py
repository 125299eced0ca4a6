"""The one exception class that bad user input ends in, and methods that are refused."""

from collections.abc import Callable
from typing import Any


class InvalidInputError(ValueError):
    """A formula, structure, label or file that cannot be used; the message names it and its row.

    Examples
    --------
    >>> from polysrl_dc.errors import InvalidInputError
    >>> issubclass(InvalidInputError, ValueError)
    True
    """


def refused(name: str, instead: str) -> Callable[..., Any]:
    """A method of a base class that cannot do what it says here and says what can.

    Parameters
    ----------
    name : str
        Of the method.
    instead : str
        What to call.

    Returns
    -------
    callable
        Raises NotImplementedError, whatever it is called with.

    Examples
    --------
    >>> refused("fit_generator", "fit(dataset)")(None)
    Traceback (most recent call last):
    NotImplementedError: fit_generator is not supported: use fit(dataset)
    """

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} is not supported: use {instead}")

    method.__doc__ = f"Refused with a NotImplementedError: use {instead}."
    return method
