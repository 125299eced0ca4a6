"""The nine wet-lab targets of the paper: every model, both protocols, the same five folds.

    python benchmarks/run_wetlab.py --data-dir DATA --seeds 3
    python benchmarks/run_wetlab.py --data-dir DATA --encoder runs/mine --protocols representation
"""

from __future__ import annotations

import pandas as pd
import paper_protocol
from targets import wetlab_targets


def main(argv: list[str] | None = None) -> pd.DataFrame | None:
    """Run the command, see :func:`paper_protocol.main`."""
    return paper_protocol.main(argv, "wetlab", wetlab_targets, __doc__)


if __name__ == "__main__":
    main()
