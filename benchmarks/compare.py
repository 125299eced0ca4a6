"""PolySRL beside Roost, CrabNet and Magpie with a random forest, on the same folds.

    python benchmarks/compare.py --data-dir DATA --seeds 3              # wet lab, Table 8
    python benchmarks/compare.py --data-dir DATA --seeds 3 --matbench   # Matbench's small tasks
    python benchmarks/compare.py --speed     # formulas per second; see --speed --help
    python benchmarks/compare.py --cost      # seconds of a fold of the tables; see --cost --help

Folds, records, scores and further options are those of ``run_wetlab.py`` (with ``--matbench`` of
``run_matbench.py --paper``): what is there is not run again. It ends with the mean errors, the
paper's beneath them, and the paired differences to PolySRL.
"""

from __future__ import annotations

import argparse
import sys

import compare_cost
import compare_speed
import paper_protocol
from paired import read_paper
from results import COMPARED, MATBENCH_8, TABLE_8, cells_of, compared
from summarize import section
from targets import small_targets, wetlab_targets
from tasks import find_data_dir

#: The protocol under which each model trains all that it has; Magpie has no encoder to freeze.
PROTOCOL = {name: "representation" if "magpie" in name else "transfer" for name in COMPARED}


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, or with ``--speed`` or ``--cost`` measure; print the comparison."""
    argv = sys.argv[1:] if argv is None else argv
    measured = {"--speed": compare_speed, "--cost": compare_cost}
    if argv and argv[0] in measured:
        return measured[argv[0]].main(argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=COMPARED, metavar="MODEL", help="default: the table's")
    add("--matbench", action="store_true", help="the small tasks of Matbench, not the wet lab")
    add("--data-dir", help="layout of the shared data; or POLYSRL_DATA")
    arguments, others = parser.parse_known_args(argv)
    if arguments.data_dir:
        others += ["--data-dir", arguments.data_dir]
    suite, table = ("paper", MATBENCH_8) if arguments.matbench else ("wetlab", TABLE_8)
    scores = None
    for protocol in dict.fromkeys(PROTOCOL.values()):
        models = [n for n in arguments.models or table.models if PROTOCOL[n] == protocol]
        if models:
            chosen = [*others, "--models", *models, "--protocols", protocol]
            targets_of = small_targets if arguments.matbench else wetlab_targets
            scores = paper_protocol.main(chosen, suite, targets_of, __doc__)
    if scores is not None:
        cells = cells_of(compared(scores), "polysrl")
        paper = read_paper(find_data_dir(arguments.data_dir))
        print("\n".join(section(cells, paper, table, "polysrl")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
