"""DeepChem, imported without its lines on optional libraries that it misses or finds outdated."""

import io
import logging
from contextlib import redirect_stderr

_logger = logging.getLogger("deepchem")
_level = _logger.level
_logger.setLevel(logging.ERROR)
try:
    with redirect_stderr(io.StringIO()):  # wandb writes there, if it is installed
        import deepchem  # noqa: F401
finally:
    _logger.setLevel(_level)
