"""Which models are loaded where: what is waited for is brought about, as far as the devices' memory allows."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.bundle import BundleError
from runtime.devices import DeviceError
from server.fleet import Demand, ModelState, Offer
from server.supervision.catalog import Catalog, Entry
from server.supervision.deployment import Deployment
from server.supervision.launch import Common, Launch, launches, sampling_of
from server.supervision.placement import DoesNotFitError, Seat, crowded, free, place
from server.supervision.process import ServeError

PATIENCE_SECONDS = 5.0
"""How long a model waits for idle ones to make room. Then the one that has been loaded for longest takes no new requests and
leaves once it has answered those that it has, so that no model is kept out by others that are never idle."""

LOOK_SECONDS = 1.0
"""Between two looks at the engines' folder: there may be many rounds a second."""

log = logging.getLogger("engineshed")


@dataclass
class Wish:
    """A model that somebody waits for."""

    since: float
    reload: bool = False
    """Beside the deployment that serves it now, whose place the new one is to take."""
    commanded: bool = False
    """A command waits for what becomes of it, and takes it back."""
    preloaded: bool = False
    """It is of the start; where it is refused, that stays known."""
    refused: str = ""
    """Why it cannot be had."""


@dataclass(frozen=True)
class Fault:
    """Why a build is not loaded any more."""

    build: str
    reason: str


@dataclass(frozen=True)
class Rules:
    """What models there are, where they may run, and how long they may take to leave."""

    catalog: Catalog
    seats: Sequence[Seat]
    common: Common
    preload: Sequence[str]
    """Models to load at the start; the first is meant where a request names none."""
    drain_seconds: float
    """What running answers get to finish when a model is to leave."""
    silence: float
    """Seconds after which an engine from which nothing comes is taken for dead."""


class Models:
    """The deployments there are, and the wishes for others. `round` does what can be done now.

    `demands` gives what the HTTP processes need and hold; `changed` is called when a round would find something else.
    """

    def __init__(self, rules: Rules, demands: Callable[[], list[Demand | None]], changed: Callable[[], None]) -> None:
        self._rules = rules
        self._demands = demands
        self._changed = changed
        self.deployments: dict[str, Deployment] = {}
        """By id, the oldest first."""
        self.wishes: dict[str, Wish] = {}
        self.faults: dict[str, Fault] = {}
        self._looked = time.monotonic()
        for name in rules.preload:
            self.wishes[name] = Wish(time.monotonic(), preloaded=True)

    # What is asked for --------------------------------------------------------------------------------------------

    def wish(self, name: str, *, commanded: bool = False, reload: bool = False) -> None:
        """Have the model loaded, or with `reload` its bundle as it is now in the place of what serves it."""
        wish = self.wishes.get(name)
        if wish is None:
            wish = self.wishes[name] = Wish(time.monotonic())
            self._changed()
        wish.reload = wish.reload or reload
        wish.commanded = wish.commanded or commanded

    def note_use(self, demand: Demand) -> None:
        """Note when models were asked for last."""
        for deployment in self.deployments.values():
            deployment.used = max(deployment.used, demand.used.get(deployment.name, 0.0))

    # How things stand ---------------------------------------------------------------------------------------------

    def of(self, name: str) -> list[Deployment]:
        """The model's deployments that take requests or will, the oldest first."""
        return [deployment for deployment in self.serving if deployment.name == name]

    @property
    def serving(self) -> list[Deployment]:
        """Those of all models."""
        return [deployment for deployment in self.deployments.values() if not (deployment.draining or deployment.ended)]

    @property
    def offers(self) -> tuple[Offer, ...]:
        """Every model, the one that is meant where none is named first."""
        names = [*self._rules.preload, *self._rules.catalog.entries, *(each.name for each in self.deployments.values())]
        return tuple(map(self.describe, dict.fromkeys(names)))

    def describe(self, name: str) -> Offer:
        """The model, as it can be asked for now."""
        state, entry, wish = self._state(name), self._rules.catalog.entries.get(name), self.wishes.get(name)
        reason = ""
        if state == "quarantined":
            reason = f"{self.faults[name].reason}. Export it again, or reload it: POST /admin/models/{name}/reload"
        elif state == "refused":
            reason = str(entry) if isinstance(entry, BundleError) else wish.refused if wish else "the bundle is gone"
        elif state == "waiting":
            reason = "it waits for other models to make room"
        context = self._rules.common.of(name).context
        if not isinstance(entry, Entry):
            return Offer(name, state, preloaded=name in self._rules.preload, reason=reason)
        longest = entry.bundle.max_length
        preloaded, task = name in self._rules.preload, entry.bundle.task
        sampling = sampling_of(entry, self._rules.common.of(name))
        return Offer(name, state, entry.bundle.created, min(context or longest, longest), preloaded, reason, task, sampling)

    def _state(self, name: str) -> ModelState:
        mine = self.of(name)
        wish = self.wishes.get(name)
        if any(deployment.ready for deployment in mine):
            return "ready"
        if mine:
            return "loading"
        entry = self._rules.catalog.entries.get(name)
        fault = self.faults.get(name)
        if fault is not None and isinstance(entry, Entry) and fault.build == entry.build:
            return "quarantined"
        if not isinstance(entry, Entry) or (wish is not None and wish.refused):
            return "refused"
        return "cold" if wish is None else "waiting"

    # A round ------------------------------------------------------------------------------------------------------

    def round(self) -> None:
        """End what is drained, let new builds take the old ones' place, load what is waited for."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._rules.catalog.refresh()
        self._retire()
        self._turn_over()
        self._grant()

    def _retire(self) -> None:
        """Forget what has ended, end what is drained, quarantine what nothing can be expected of."""
        now = time.monotonic()
        for deployment in list(self.deployments.values()):
            if deployment.ended:
                del self.deployments[deployment.id]
                log.info("unloaded %s", deployment.name)
            elif deployment.draining and not deployment.ending and self._drained(deployment, now):
                deployment.end()
            elif deployment.given_up and not deployment.draining:
                reason = "; ".join(deployment.reasons)
                log.error("%s is quarantined: %s", deployment.name, reason)
                self.faults[deployment.name] = Fault(deployment.entry.build, reason)
                self.wishes.pop(deployment.name, None)
                deployment.drain()

    def _drained(self, deployment: Deployment, now: float) -> bool:
        """Whether nobody needs the deployment any more, or its time is up."""
        since = deployment.draining_since or now
        if now - since > self._rules.drain_seconds:
            log.warning("ending %s with answers that did not finish in time", deployment.name)
            return True
        return bool(deployment.drained_in) and all(
            demand is not None and demand.seen >= deployment.drained_in and not demand.leases.get(deployment.id)
            for demand in self._demands()
        )

    def _turn_over(self) -> None:
        """Where a model's new deployment is ready, have the old one leave."""
        for name in {deployment.name for deployment in self.serving}:
            *old, new = self.of(name)
            if new.settled and new.ready:
                for deployment in old:
                    deployment.drain()

    def _grant(self) -> None:
        """Load what is waited for, the longest-waiting first."""
        for name in {name for demand in self._known() for name in demand.waiting}:
            if not self.of(name):
                self.wish(name)
        for name, wish in sorted(self.wishes.items(), key=lambda item: item[1].since):
            self._load(name, wish)
        for name, wish in list(self.wishes.items()):
            granted = not wish.reload and self.of(name)
            wanted = wish.commanded or wish.preloaded or self._waited_for(name)
            if granted or (wish.refused and not wanted):
                del self.wishes[name]

    def _load(self, name: str, wish: Wish) -> None:
        if not wish.reload and self.of(name):
            return
        try:
            entry = self._rules.catalog.find(name)
            fault = self.faults.get(name)
            if fault is not None and fault.build == entry.build:
                raise DoesNotFitError(fault.reason)
            self.faults.pop(name, None)
            options = launches(entry, self._rules.common, self._rules.seats, self._rules.catalog)
            chosen = self._choose(name, options, wish)
        except (BundleError, DeviceError, DoesNotFitError, ServeError) as error:
            if str(error) != wish.refused:
                log.error("%s cannot be loaded: %s", name, error)
            wish.refused = str(error)
            return
        wish.refused = ""
        if chosen:
            self._start(entry, chosen)
            del self.wishes[name]

    def _choose(self, name: str, options: Sequence[Launch], wish: Wish) -> list[Launch]:
        """The launches for which there is room now; where there is none, see to it that there will be.

        Raises DoesNotFitError where there never will.
        """
        seats = [launch.seat for launch in options]
        needs = {launch.seat.name: launch.need for launch in options}
        why = {launch.seat.name: launch.why for launch in options}
        replicas = self._rules.common.of(name).replicas or len(seats)
        serving = self.serving
        staying = [deployment.occupant for deployment in serving]
        chosen = place(seats, needs, replicas, staying, self._removable(name, wish), why)
        if chosen is None:
            others = [d.id for d in serving if d.name != name and not self._rules.common.of(d.name).pinned]
            if place(seats, needs, 1, staying, others, why) is None:
                raise DoesNotFitError(crowded(seats, needs, staying, {d.id: d.name for d in serving if d.id not in others}))
            return []
        for id_ in chosen.evicted:
            log.info("%s makes room for %s", self.deployments[id_].name, name)
            self.deployments[id_].drain()
        everybody = [deployment.occupant for deployment in self.deployments.values()]
        if any(free(seat, everybody) < needs[seat.name] for seat in chosen.seats):
            return []  # until those that leave are gone
        return [launch for launch in options if launch.seat in chosen.seats]

    def _removable(self, name: str, wish: Wish) -> list[str]:
        """Deployments that may make room for `name`: idle ones, asked for least recently first; then, if it has waited for long
        enough, busy ones, loaded for longest first.
        """
        others = [d for d in self.serving if d.name != name and d.settled and not self._rules.common.of(d.name).pinned]
        busy = [deployment for deployment in others if self._needed(deployment)]
        idle = sorted((deployment for deployment in others if deployment not in busy), key=lambda deployment: deployment.used)
        patient = time.monotonic() - wish.since < PATIENCE_SECONDS
        return [deployment.id for deployment in (idle if patient else [*idle, *busy])]

    def _needed(self, deployment: Deployment) -> bool:
        """Whether a request runs on it, or waits for it."""
        return self._waited_for(deployment.name) or any(demand.leases.get(deployment.id) for demand in self._known())

    def _waited_for(self, name: str) -> bool:
        return any(demand.waiting.get(name) for demand in self._known())

    def _known(self) -> list[Demand]:
        return [demand for demand in self._demands() if demand is not None]

    def _start(self, entry: Entry, chosen: Sequence[Launch]) -> None:
        log.info("loading %s (%s) on %s", entry.name, chosen[0].variant, ", ".join(launch.seat.name for launch in chosen))
        sampling = sampling_of(entry, self._rules.common.of(entry.name))
        deployment = Deployment(entry, chosen, self._rules.silence, self._changed, sampling)
        self.deployments[deployment.id] = deployment
