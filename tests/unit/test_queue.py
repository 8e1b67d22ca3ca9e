"""Who gets the next slot, and whose time is up."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.messages import Generate
from runtime.queue import REMEMBERED, Deadlines, Queue
from runtime.sequence import Sequence

CONTEXT = 1000
_numbers = itertools.count()


def waiting(client: str = "", priority: int = 0, prompt: int = 2, answer: int = 10) -> Sequence:
    number = next(_numbers)
    return Sequence(b"front", Generate(str(number), [1] * prompt, answer, client=client, priority=priority), arrived=number)


def serve(sequence: Sequence, tokens: int) -> None:
    """Let `sequence` have so many more tokens, its prompt among them."""
    computed = min(tokens, sequence.prefix_left)
    sequence.computed += computed
    sequence.tokens += [1] * (tokens - computed)


def served(queue: Queue, count: int) -> list[str]:
    """The clients of the next `count`, one after the other, each of which gets ten tokens."""
    clients = []
    for _ in range(count):
        sequence = queue.pop()
        serve(sequence, 10)
        queue.end(sequence)
        clients.append(sequence.request.client)
    return clients


class Server:
    """So many slots over a queue; each time that one falls free, the next in turn gets it."""

    def __init__(self, slots: int) -> None:
        self.queue, self.slots = Queue(CONTEXT), slots
        self.running: list[Sequence] = []
        self.got: Counter[str] = Counter()
        """Tokens by client."""

    def ask(self, client: str, answer: int) -> None:
        self.queue.push(waiting(client, answer=answer))

    def step(self) -> None:
        """Fill the free slots, give everyone a token, and let those go that have all."""
        while len(self.running) < self.slots and self.queue:
            self.running.append(self.queue.pop())
        for sequence in self.running:
            serve(sequence, 1)
            self.got[sequence.request.client] += 1
        for sequence in [s for s in self.running if s.served == s.most(CONTEXT)]:
            self.running.remove(sequence)
            self.queue.end(sequence)


@given(st.lists(st.tuples(st.sampled_from(["push", "push", "pop", "end"]), st.integers(-2, 2), st.sampled_from("abc"))))
def test_priority_goes_first_and_a_client_keeps_its_order_whatever_comes_and_goes(
    moves: list[tuple[str, int, str]],
) -> None:
    """A list, searched from its front, is what the queue must agree with."""
    queue, wait, running = Queue(CONTEXT), list[Sequence](), list[Sequence]()
    for number, (move, priority, client) in enumerate(moves):
        if move == "push":
            wait.append(waiting(client, priority, prompt=1 + number % 7, answer=number * 100 + 1))
            queue.push(wait[-1])
        elif move == "pop" and wait:
            sequence = queue.pop()
            assert sequence.request.priority == min(s.request.priority for s in wait)
            own = [s for s in wait if s.request.client == sequence.request.client]
            assert sequence is next(s for s in own if s.request.priority == sequence.request.priority)
            serve(sequence, number)
            wait.remove(sequence)
            running.append(sequence)
        elif move == "end" and wait + running:  # cancelled where it waits, or where it runs
            sequence = (wait + running)[number % len(wait + running)]
            (wait if sequence in wait else running).remove(sequence)
            queue.end(sequence)
        assert len(queue) == len(wait)
        assert queue.tokens == sum(min(len(s.request.prompt) + s.request.max_tokens, CONTEXT) for s in wait)
    for sequence in wait + running:
        queue.end(sequence)
    assert not queue._levels  # nothing is kept of anyone


def test_nobody_is_popped_where_nobody_waits() -> None:
    with pytest.raises(RuntimeError, match="nobody waits"):
        Queue(CONTEXT).pop()


@given(st.integers(1, 4), st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=5), min_size=2, max_size=4))
def test_clients_that_always_wait_get_the_same_within_a_request_for_each_slot(slots: int, answers: list[list[int]]) -> None:
    """However long the ones' requests are, and the others'. With one slot that is one request."""
    server, steps = Server(slots), 200
    for client, lengths in enumerate(answers):
        for length in itertools.islice(itertools.cycle(lengths), slots * steps // 3 + 1):
            server.ask(str(client), length)
    largest = 2 + max(map(max, answers))
    for _ in range(steps):
        server.step()
        got = [server.got[str(client)] for client in range(len(answers))]
        assert max(got) - min(got) <= slots * largest


def test_a_client_that_is_alone_gets_every_slot() -> None:
    server = Server(4)
    for _ in range(9):
        server.ask("alone", 20)
    server.step()
    assert len(server.running) == 4


def test_a_newcomer_gets_as_much_as_the_others_without_having_every_slot_for_it() -> None:
    """By what its requests had so far, it would get every slot that falls free until the first of them are done."""
    server = Server(8)
    for number in range(90):
        server.ask("first", min(100, 12 * (number + 1)))  # so that they end one by one
    for _ in range(400):
        server.step()
    for _ in range(60):
        server.ask("second", 100)
    before, most = server.got["first"], 0
    for _ in range(400):
        server.step()
        most = max(most, sum(sequence.request.client == "second" for sequence in server.running))
    assert 4 <= most < 7
    assert abs(server.got["first"] - before - server.got["second"]) <= 2 * 102


def test_prompt_tokens_that_were_found_in_a_slot_cost_nothing() -> None:
    queue = Queue(CONTEXT)
    for client in ("found", "computed", "computed", "found"):
        queue.push(waiting(client, prompt=200))
    for sequence in (queue.pop(), queue.pop()):
        sequence.computed = sequence.cached = 190 if sequence.request.client == "found" else 0
        serve(sequence, sequence.prefix_left + 5)
        queue.end(sequence)
    assert queue.pop().request.client == "found"


def test_a_newcomer_does_not_pay_for_what_others_had_before_nor_collect_it() -> None:
    queue = Queue(CONTEXT)
    for _ in range(13):
        queue.push(waiting("old"))
    assert served(queue, 9) == ["old"] * 9
    for _ in range(4):
        queue.push(waiting("new"))
    assert served(queue, 8) == ["old", "new"] * 4


def test_what_a_client_had_while_nobody_waited_is_not_held_against_it() -> None:
    queue = Queue(CONTEXT)
    queue.push(waiting("early"))
    serve(queue.pop(), 500)
    for client in ("late", "early", "late", "early"):
        queue.push(waiting(client))
    assert served(queue, 4) == ["late", "early"] * 2


def test_nobody_saves_up_by_not_asking() -> None:
    """A client whose one request had little gets no more than its share once it has several."""
    queue = Queue(CONTEXT)
    queue.push(waiting("rare"))
    queue.push(waiting("busy"))
    rare, busy = queue.pop(), queue.pop()
    for _ in range(9):
        queue.push(waiting("busy"))
    serve(rare, 5)
    serve(busy, 900)
    for _ in range(9):
        queue.push(waiting("rare"))
    queue.end(rare)
    queue.end(busy)
    assert Counter(served(queue, 8)) == {"rare": 4, "busy": 4}


def test_clients_that_ask_one_thing_at_a_time_do_not_starve_one_that_owes_them() -> None:
    """There is always one of them that waits, and would have less than the other each time were it forgotten in between."""
    server = Server(1)
    server.ask("bulk", 900)
    for client in "abc":
        server.ask(client, 3)
    server.step()
    assert server.running[0].request.client == "bulk"
    server.ask("bulk", 900)
    for _ in range(8000):
        for client in "abc":
            if client not in asking(server):
                server.ask(client, 3)
        server.step()
    assert server.got["bulk"] > 1000


def test_ever_new_clients_do_not_starve_one_that_owes_them() -> None:
    queue = Queue(CONTEXT)
    queue.push(waiting("bulk"))
    queue.push(waiting("0"))
    sequence = queue.pop()
    serve(sequence, 900)
    queue.push(waiting("bulk"))
    queue.end(sequence)
    for number in range(1, 2 * REMEMBERED):
        queue.push(waiting(str(number)))
        sequence = queue.pop()
        if sequence.request.client == "bulk":
            return
        serve(sequence, 5)
        queue.end(sequence)
        assert len(queue._levels[0].clients) <= REMEMBERED + 3
    pytest.fail("the client that had much waits still")


def asking(server: Server) -> set[str]:
    """Clients that have a request which runs or waits."""
    clients = server.queue._levels[0].clients if server.queue._levels else {}
    return {name for name, client in clients.items() if not client.absent}


@given(
    st.lists(
        st.tuples(
            st.floats(0, 20), st.sampled_from([0.0, 1.0, 5.0]), st.sampled_from([0.0, 3.0, 9.0]), st.none() | st.floats(0, 4)
        )
    ),
    st.lists(st.floats(0, 40)),
)
def test_whoever_is_out_of_time_is_told_once_and_nobody_else(
    requests: list[tuple[float, float, float, float | None]], looks: list[float]
) -> None:
    """Some get a slot after a while; the limit of waiting is then theirs no more."""
    deadlines, ended = Deadlines(), list[Sequence]()
    starts: dict[Sequence, float] = {}
    for arrived, queued, total, after in requests:
        request = Generate("a", [1], 9, queue_seconds=queued, total_seconds=total)
        sequence = Sequence(b"front", request, arrived)
        starts[sequence] = arrived + (math.inf if after is None else after)
        deadlines.watch(sequence)
    for now in sorted(looks):
        for sequence, start in starts.items():
            if sequence.finish is None and start <= now and start < sequence.deadline:
                sequence.started = start
                sequence.finish = "stop" if start + 2 < min(now, sequence.deadline) else None
        late = deadlines.expired(now)
        open_ = [sequence for sequence in starts if sequence.finish is None]
        assert sorted(map(id, late)) == sorted(id(sequence) for sequence in open_ if sequence.deadline <= now)
        for sequence in late:
            sequence.finish = "timeout"
        ended += late
    assert len(set(ended)) == len(ended)


def test_sequences_that_ended_in_time_do_not_pile_up_until_their_deadlines() -> None:
    deadlines = Deadlines()
    for _ in range(1000):
        sequence = Sequence(b"front", Generate("a", [1], 9, total_seconds=3600))
        deadlines.watch(sequence)
        sequence.finish = "stop"
    assert len(deadlines._heap) <= 32
