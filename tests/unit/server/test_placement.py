"""Where engines go, and who makes room: sums of bytes, small enough to be done by head."""

import pytest

from runtime.devices import Device
from server.supervision.placement import DoesNotFitError, Occupant, Placement, Seat, crowded, place

LEFT, RIGHT = Seat("cpu#1", Device("cpu"), 100), Seat("cpu#2", Device("cpu"), 60)
WHY = {"cpu#1": "40 x 1", "cpu#2": "40 x 1"}


def placed(need: int, replicas: int, *occupants: Occupant, removable: tuple[str, ...] = ()) -> Placement | None:
    return place([LEFT, RIGHT], {"cpu#1": need, "cpu#2": need}, replicas, occupants, removable, WHY)


def on(id_: str, left: int = 0, right: int = 0) -> Occupant:
    return Occupant(id_, {name: size for name, size in (("cpu#1", left), ("cpu#2", right)) if size})


def test_the_emptiest_device_comes_first() -> None:
    assert placed(40, 1) == Placement((LEFT,))
    assert placed(40, 1, on("a", left=50)) == Placement((RIGHT,))
    assert placed(40, 2, on("a", left=50)) == Placement((RIGHT, LEFT))


def test_a_device_that_is_too_small_for_the_engine_is_left_out() -> None:
    assert placed(80, 2) == Placement((LEFT,))


def test_the_first_that_may_leave_does_and_nobody_in_vain() -> None:
    full = [on("old", left=50), on("older", right=50), on("new", left=50)]
    assert placed(40, 1, *full, removable=("older", "old", "new")) == Placement((RIGHT,), ("older",))
    assert placed(60, 1, *full, removable=("old", "new")) == Placement((LEFT,), ("old", "new"))
    assert placed(60, 1, *full, removable=("older", "old")) == Placement((RIGHT,), ("older",))


def test_one_whose_leaving_does_not_help_stays() -> None:
    crowd = [on("small", right=10), on("pinned", right=50), on("big", left=90)]
    assert placed(40, 1, *crowd, removable=("small", "big")) == Placement((LEFT,), ("big",))


def test_where_there_is_no_room_for_all_replicas_there_are_fewer() -> None:
    assert placed(40, 2, on("pinned", right=60)) == Placement((LEFT,))
    assert placed(40, 2, on("pinned", right=60), on("idle", left=90), removable=("idle",)) == Placement((LEFT,), ("idle",))


def test_none_where_others_would_have_to_leave() -> None:
    assert placed(40, 1, on("busy", left=90), on("other", right=60)) is None


def test_what_no_device_could_hold_is_refused_with_the_sum() -> None:
    mib = 1 << 20
    seat = Seat("cpu", Device("cpu"), 100 * mib)
    with pytest.raises(DoesNotFitError, match=r"needs 140 MiB \(7 x 20 MiB\) and cpu may take 100 MiB"):
        place([seat], {"cpu": 140 * mib}, 1, (), (), {"cpu": "7 x 20 MiB"})


def test_who_is_in_the_way_is_told_by_name() -> None:
    mib = 1 << 20
    seat = Seat("cpu", Device("cpu"), 100 * mib)
    said = crowded([seat], {"cpu": 40 * mib}, [Occupant("d1", {"cpu": 70 * mib})], {"d1": "pinned-model"})
    assert said.startswith("the engine needs 40 MiB beside 70 MiB of pinned-model, and cpu may take 100 MiB")
