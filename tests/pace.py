"""How the time of some work grows with what it is given."""

import gc
import time
from collections.abc import Callable

TIMES = 8
"""What is given grows by this much: linear work takes so many times as long, quadratic work the square of it."""
LINEAR = TIMES * 3
"""Far from both, for a machine that does other things too."""


def growth(make: Callable[[int], Callable[[], object]], count: int) -> float:
    """How many times longer the work that `make` makes takes for `TIMES` times `count`; without garbage collection."""

    def seconds(work: Callable[[], object]) -> float:
        found = []
        for _ in range(3):
            begin = time.process_time()
            work()
            found.append(time.process_time() - begin)
        return min(found)

    few, many = make(count), make(count * TIMES)
    gc.collect()
    gc.disable()
    try:
        return seconds(many) / seconds(few)
    finally:
        gc.enable()
