"""DeepChem, imported without its line for each optional library that it does not find."""

import logging

_logger = logging.getLogger("deepchem")
_level = _logger.level
_logger.setLevel(logging.ERROR)
try:
    import deepchem  # noqa: F401
finally:
    _logger.setLevel(_level)
