"""Whose texts are computed next: the loop over an engine that notes what it is asked for and gives each text its own number."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from runtime import embedding_loop
from runtime.embedding_loop import Done, EmbeddingLoop
from runtime.engine import EngineError, Float32, Int64
from runtime.loop import News
from runtime.messages import Embed, Refused


@dataclass
class Noting:
    """In the place of ONNX Runtime, which test_embedding_worker has: an embedding is the text's first token and its length."""

    context: int = 100
    vocab_size: int = 1000
    dimensions: int = 2
    batches: list[list[int]] = field(default_factory=list)
    """The lengths in each."""
    broken: bool = False

    def embed(self, input_ids: Int64, lengths: Int64) -> Float32:
        if self.broken:
            raise EngineError("it is broken")
        self.batches.append(lengths.tolist())
        assert input_ids.shape == (len(lengths), lengths.max())
        return np.stack([input_ids[:, 0], lengths], axis=1).astype(np.float32)

    def close(self) -> None:
        pass


@pytest.fixture
def engine() -> Noting:
    return Noting()


def made(engine: Noting, queue: int = 100, budget: int = 512) -> EmbeddingLoop:
    return EmbeddingLoop(engine, queue=queue, budget=budget, clock=lambda: 0.0)


def drain(loop: EmbeddingLoop) -> list[News | Done]:
    news: list[News | Done] = []
    while loop.busy:
        news += loop.step()
    return news


def test_a_slow_engine_gets_small_batches(engine: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 100, 1))
    monkeypatch.setattr("runtime.embedding_loop.time.perf_counter", lambda: float(next(seconds)))  # a second each batch
    loop = made(engine)
    loop.submit(b"front", Embed("a", [text(1, 32)] * 40))
    drain(loop)
    assert {len(batch) for batch in engine.batches} == {4}, "128 tokens each"


def text(first: int, length: int) -> list[int]:
    return [first] * length


def test_every_text_gets_its_own_embedding_in_the_order_of_the_inputs(engine: Noting) -> None:
    loop = made(engine, budget=64)
    draw = np.random.default_rng(0)
    asked = {}
    for number in range(20):
        inputs = [text(int(draw.integers(0, 1000)), int(draw.integers(1, 101))) for _ in range(int(draw.integers(1, 40)))]
        asked[str(number)] = inputs
        assert loop.submit(b"front", Embed(str(number), inputs, client=str(number % 3))) is None
    for done in drain(loop):
        assert isinstance(done, Done)
        inputs = asked.pop(done.embedded.id)
        got = np.frombuffer(done.embedded.vectors, "<f4").reshape(-1, 2)
        assert got.tolist() == [[each[0], len(each)] for each in inputs]
    assert not asked
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 64 for batch in engine.batches)
    assert loop.counters.finished == 20
    assert loop.counters.prompt_tokens == sum(map(sum, engine.batches))
    assert (loop.running, loop.waiting, loop.waiting_tokens) == (0, 0, 0)


def test_texts_of_like_length_share_a_batch_whoever_asks(engine: Noting) -> None:
    loop = made(engine, budget=400)
    loop.submit(b"front", Embed("first", [text(1, 1)]))
    drain(loop)  # now it is known that the engine is quick
    engine.batches.clear()
    loop.submit(b"front", Embed("a", [text(1, 100), text(1, 5), text(1, 6)]))
    loop.submit(b"front", Embed("b", [text(2, 90), text(2, 4)]))
    drain(loop)
    assert [sorted(batch) for batch in engine.batches] == [[90, 100], [4, 5, 6]]


def test_requests_take_turns_and_so_do_clients(engine: Noting) -> None:
    loop = made(engine, budget=100)
    loop.submit(b"front", Embed("big", [text(1, 100)] * 50, client="many"))
    for number in range(3):
        loop.submit(b"front", Embed(f"other {number}", [text(2, 100)] * 2, client="many"))
    loop.step()
    loop.submit(b"front", Embed("small", [text(3, 100)], client="few"))
    order: list[str] = []
    for _ in range(9):
        order += [done.embedded.id for done in loop.step() if isinstance(done, Done)]
    assert order[0] == "small"
    assert set(order) == {"small", "other 0", "other 1", "other 2"}


def test_a_smaller_priority_goes_first(engine: Noting) -> None:
    loop = made(engine, budget=100)
    loop.submit(b"front", Embed("late", [text(1, 100)], priority=1))
    loop.submit(b"front", Embed("soon", [text(2, 100)] * 3, priority=0))
    ids = [done.embedded.id for done in drain(loop) if isinstance(done, Done)]
    assert ids == ["soon", "late"]


def test_an_engine_that_fails_ends_the_requests_of_the_batch_and_no_others(engine: Noting) -> None:
    loop = made(engine, budget=100)
    loop.submit(b"front", Embed("one", [text(1, 100)] * 3))
    loop.submit(b"front", Embed("two", [text(1, 100)]))
    engine.broken = True
    (news,) = loop.step()
    assert isinstance(news, News)
    assert (news.row.id, news.row.finish) == ("one", "error")
    assert "it is broken" in news.row.message
    engine.broken = False
    (done,) = drain(loop)
    assert isinstance(done, Done)
    assert done.embedded.id == "two"


def test_embeddings_that_wait_for_others_are_bounded(engine: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_loop, "VECTOR_BYTES", 800)
    loop = made(engine)
    assert loop.submit(b"front", Embed("alone", [text(1, 1)] * 2000)) is None, "nobody else is there"
    refused = loop.submit(b"front", Embed("more", [text(1, 1)]))
    assert isinstance(refused, Refused)
    assert refused.reason == "queue full"
    drain(loop)
    assert loop.submit(b"front", Embed("more", [text(1, 1)])) is None


def test_as_many_wait_as_may(engine: Noting) -> None:
    loop = made(engine, queue=2, budget=100)
    for id_ in "abc":
        assert loop.submit(b"front", Embed(id_, [text(1, 100)] * 2)) is None
    refused = loop.submit(b"front", Embed("d", [text(1, 100)]))
    assert isinstance(refused, Refused)
    loop.step()
    assert (loop.running, loop.waiting) == (1, 2)
    assert isinstance(loop.submit(b"front", Embed("d", [text(1, 100)])), Refused)
    assert loop.cancel(b"front", "b") is not None
    assert loop.cancel(b"front", "b") is None
    assert loop.submit(b"front", Embed("d", [text(1, 100)])) is None
    loop.cancel_all(b"front")
    assert not loop.busy
