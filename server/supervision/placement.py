"""Which devices an engine goes to, and which engines make room for it. Only sums; nothing is started or ended here."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from runtime.devices import Device


@dataclass(frozen=True)
class Seat:
    """A device that engines can be put on, or a share of one."""

    name: str
    """As log and metrics name it: `cuda:0`, `cpu`, or `cpu#1` where the CPU's cores are shared out."""
    device: Device
    budget: int
    """Bytes of memory that the engines on it may take together."""
    cores: tuple[int, ...] = ()
    """Of a CPU that is shared out: the cores of this share."""


@dataclass(frozen=True)
class Occupant:
    """Engines of one model that are loaded."""

    id: str
    held: Mapping[str, int]
    """Bytes that they may take at their fullest, by seat."""


@dataclass(frozen=True)
class Placement:
    """Where a model's engines go, once `evicted` have left."""

    seats: tuple[Seat, ...]
    evicted: tuple[str, ...] = ()
    """Ids of occupants."""


class DoesNotFitError(Exception):
    """No device has room for the engine, whoever leaves; the message has the arithmetic."""


def place(
    seats: Sequence[Seat],
    needs: Mapping[str, int],
    replicas: int,
    occupants: Collection[Occupant],
    removable: Sequence[str],
    why: Mapping[str, str],
) -> Placement | None:
    """Seats for `replicas` engines that take `needs` bytes by seat, or as many as there can be; the emptiest first.

    Of `occupants`, those in `removable` may be evicted, the first before the others, and no more than necessary. None where
    they do not make enough room, and others would. Raises DoesNotFitError where even an empty device has too little; `why`
    tells by seat how its need comes about.
    """
    possible = [seat for seat in seats if needs[seat.name] <= seat.budget]
    if not possible:
        raise DoesNotFitError(_arithmetic(seats, needs, why))
    for count in range(min(replicas, len(possible)), 0, -1):
        going = _leaving(possible, needs, count, occupants, removable)
        if going is not None:
            return Placement(tuple(_fitting(possible, needs, occupants, going)[:count]), tuple(going))
    return None


def _leaving(
    seats: Sequence[Seat], needs: Mapping[str, int], count: int, occupants: Collection[Occupant], removable: Sequence[str]
) -> list[str] | None:
    """Who must leave for `count` of the seats to have room enough; None where that does not suffice."""
    for leavers in range(len(removable) + 1):
        going = list(removable[:leavers])
        if len(_fitting(seats, needs, occupants, going)) >= count:
            break
    else:
        return None
    for id_ in removable:  # Whoever would leave a device that stays too full may stay.
        without = [other for other in going if other != id_]
        if len(_fitting(seats, needs, occupants, without)) >= count:
            going = without
    return going


def crowded(seats: Sequence[Seat], needs: Mapping[str, int], occupants: Sequence[Occupant], names: Mapping[str, str]) -> str:
    """Why there is no room although a device alone would have it: `names` by id are those that do not leave."""
    staying = [occupant for occupant in occupants if occupant.id in names]
    seat = max(seats, key=lambda seat: free(seat, staying) - needs[seat.name])
    held = " + ".join(
        f"{occupant.held[seat.name] >> 20:,} MiB of {names[occupant.id]}" for occupant in staying if seat.name in occupant.held
    )
    return (
        f"the engine needs {needs[seat.name] >> 20:,} MiB beside {held or '0 MiB'}, and {seat.name} may take "
        f"{seat.budget >> 20:,} MiB; unload one first, or raise --memory"
    )


def free(seat: Seat, occupants: Iterable[Occupant]) -> int:
    """Bytes of the seat's budget that nobody holds."""
    return seat.budget - sum(occupant.held.get(seat.name, 0) for occupant in occupants)


def _fitting(
    seats: Sequence[Seat], needs: Mapping[str, int], occupants: Collection[Occupant], going: Collection[str]
) -> list[Seat]:
    """The seats with room enough, the emptiest first; of two that are alike, the first."""
    staying = [occupant for occupant in occupants if occupant.id not in going]
    room = {seat.name: free(seat, staying) for seat in seats}
    return sorted((seat for seat in seats if needs[seat.name] <= room[seat.name]), key=lambda seat: -room[seat.name])


def _arithmetic(seats: Sequence[Seat], needs: Mapping[str, int], why: Mapping[str, str]) -> str:
    roomiest = max(seats, key=lambda seat: seat.budget - needs[seat.name])
    return (
        f"the engine needs {needs[roomiest.name] >> 20:,} MiB ({why[roomiest.name]}) and {roomiest.name} may take "
        f"{roomiest.budget >> 20:,} MiB; serve it with fewer slots or a shorter context, or raise --memory"
    )
