"""The HTTP processes' counters together: what one counted stays counted when another takes its place."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

from server.fleet import Sample

_Key = tuple[str, tuple[tuple[str, str], ...]]


class Totals:
    """Sums of counters, which each owner tells as they stand."""

    def __init__(self) -> None:
        self._now: dict[Hashable, Mapping[_Key, float]] = {}
        self._past: Counter[_Key] = Counter()

    def take(self, owner: Hashable, samples: Iterable[Sample]) -> None:
        """Replace what `owner` told before."""
        self._now[owner] = {(sample.name, sample.labels): sample.value for sample in samples}

    def retire(self, owner: Hashable) -> None:
        """Keep what `owner` told last for good; it will tell no more."""
        self._past.update(self._now.pop(owner, {}))

    def sum(self) -> tuple[Sample, ...]:
        """Every counter over all owners, those that are gone among them."""
        total: Counter[_Key] = Counter(self._past)
        for counted in self._now.values():
            total.update(counted)
        return tuple(Sample(name, labels, value) for (name, labels), value in total.items())
