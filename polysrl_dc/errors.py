"""The one exception class that bad user input ends in."""


class InvalidInputError(ValueError):
    """A formula, structure, label or file that cannot be used; the message names it and its row.

    Examples
    --------
    >>> from polysrl_dc.errors import InvalidInputError
    >>> issubclass(InvalidInputError, ValueError)
    True
    """
