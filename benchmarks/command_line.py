"""What the runners' command lines share: options for the data, and how missing data end them.

A runner's ``main`` begins with

    parser = runner_parser(__doc__, cache=True)
    arguments = parser.parse_args(argv)
    with refusing(parser):
        targets = wetlab_targets(required_data_dir(arguments.data_dir))
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from files import printable
from targets import Target
from tasks import full_name

from polysrl_dc.errors import InvalidInputError

#: Where results lie: beside the runners, wherever they are started from.
HERE = Path(os.path.relpath(Path(__file__).parent))


def runner_parser(
    description: str | None,
    data: str = "layout of the shared data; or POLYSRL_DATA",
    *,
    cache: bool = False,
    output_dir: Path | None = HERE,
    **settings: Any,
) -> argparse.ArgumentParser:
    """A parser with ``--data-dir``, ``--output-dir`` and, if asked for, ``--cache-dir``.

    Of what Matbench logs, a line for each fold, errors only are shown from then on.

    Parameters
    ----------
    description : str, optional
        Shown by ``--help`` as it is.
    data : str
        Help on ``--data-dir``.
    cache : bool
        Whether crystal structures are read.
    output_dir : path, optional
        Default of ``--output-dir``; None: it must be given. By default the folder of the runners.
    **settings
        Of :class:`argparse.ArgumentParser`.
    """
    logging.getLogger("matbench").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **settings,
    )
    parser.add_argument("--data-dir", help=data)
    if cache:
        parser.add_argument("--cache-dir", help="of packed structures; or POLYSRL_CACHE")
    place: dict[str, Any] = {"default": output_dir, "required": output_dir is None}
    parser.add_argument("--output-dir", type=Path, help="of what is read and written", **place)
    return parser


@contextmanager
def refusing(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Data and records that are missing or wrong end the command as a wrong option does."""
    try:
        yield
    except (FileNotFoundError, InvalidInputError) as error:
        parser.error(printable(str(error)))


def chosen_targets(
    parser: argparse.ArgumentParser, targets: Sequence[Target], names: Sequence[str] | None
) -> list[Target]:
    """The targets of these names, all if there are none; an unknown name ends the command.

    Those of Matbench may be named without their ``matbench_`` prefix.
    """
    known = {target.name: target for target in targets}
    try:
        return [known[full_name(name, known, "target")] for name in names or known]
    except ValueError as error:
        parser.error(str(error))
