"""How many inputs hypothesis draws, and the count of what became of them."""

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings

MADE = "generated inputs"
RIGHT = "inputs answered rightly"
REFUSED = "inputs refused with row, id and value"
LOST = "inputs lost or changed silently"
_SECONDS = 120  # for one drawing, on a machine that does other work


def draw(test: Callable, deep: bool, few: int, many: int) -> None:
    """Run a ``@given`` function on few inputs, always the same, or on many new ones."""
    settings(
        max_examples=many if deep else few,
        derandomize=not deep,
        database=None,
        deadline=None,
        print_blob=True,
        phases=set(Phase) - {Phase.reuse, Phase.target},
        suppress_health_check=list(HealthCheck),
    )(test)()


class Tally:
    """What became of the inputs; those without an answer are counted as lost, and an error."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        counts[LOST] += 0

    @contextmanager
    def inputs(self, n: int) -> Iterator[None]:
        """``n`` inputs, each of which must be reported as right or refused, in finite time."""

        def stop(*_: Any) -> None:
            raise TimeoutError(f"no answer in {_SECONDS} s")

        lost = self.counts[LOST]
        self.counts[MADE] += n
        self.counts[LOST] += n
        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(_SECONDS)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        assert self.counts[LOST] == lost, "not every input is accounted for"

    def right(self, n: int = 1) -> None:
        self.counts[RIGHT] += n
        self.counts[LOST] -= n

    def refused(self, n: int = 1) -> None:
        self.counts[REFUSED] += n
        self.counts[LOST] -= n
