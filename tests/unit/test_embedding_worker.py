"""A worker for embeddings as a front end meets it: a tiny random model, a real process, transformers beside it."""

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from export.recipe import Build
from runtime import bundle, ort
from runtime.engine import EngineError
from runtime.messages import Cancel, Embed, Embedded, Generate, Heartbeat, Progress, Refused, Reply
from tests import embedders, tiny
from tests.unit.test_worker import Front, stopped, worker
from tests.waiting import HANGS_SECONDS

Floats = npt.NDArray[np.float32]


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/worker.sock"


@pytest.fixture(scope="session")
def bert_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT's bundle, not to be written to."""
    folder = tmp_path_factory.mktemp("bert")
    model = embedders.write_model(folder / "model", "bert")
    return tiny.exporting(folder / "engines").run(embedders.recipe(model, Build("cpu", "fp32")))


def texts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(3, tiny.VOCAB, draw.integers(1, longest + 1)).tolist() for _ in range(count)]


def vectors(reply: Embedded) -> Floats:
    found: Floats = np.frombuffer(reply.vectors, "<f4").reshape(-1, reply.dimensions)
    return found


def news(front: Front) -> Reply:
    """The next message that is no heartbeat."""
    while isinstance(reply := front.receive(), Heartbeat):
        pass
    return reply


def test_ragged_texts_of_several_requests_get_transformers_embeddings(bert_bundle: Path, address: str) -> None:
    model = embedders.random_model("bert")
    with worker(bert_bundle, address, "--queue=8"):
        front = Front(address)
        ready = front.wait_ready()
        assert (ready.context, ready.vocab_size) == (128, tiny.VOCAB)
        asked = {f"r{number}": texts(1 + 30 * (number % 2), 128, number) for number in range(4)}
        for id_, inputs in asked.items():
            front.send(Embed(id_, inputs))
        for _ in range(4):
            reply = news(front)
            assert isinstance(reply, Embedded)
            expected = np.stack([embedders.by_hand(model, "cls", tokens) for tokens in asked.pop(reply.id)])
            assert np.abs(vectors(reply) - expected).max() < 1e-5
        front.beat()
        beat = front.beat()
        total = sum(len(text) for number in range(4) for text in texts(1 + 30 * (number % 2), 128, number))
        assert (beat.prompt_tokens, beat.finished, beat.running, beat.waiting, beat.waiting_tokens) == (total, 4, 0, 0, 0)
        assert (sum(beat.queue_counts), sum(beat.step_counts)) == (4, beat.steps)
        assert total / 512 <= beat.steps < 62, "texts share batches"


def test_a_request_of_a_few_texts_does_not_wait_for_one_of_thousands(bert_bundle: Path, address: str) -> None:
    with worker(bert_bundle, address, "--queue=8"):
        front = Front(address)
        front.wait_ready()
        front.send(Embed("big", [[5] * 128] * 2048))
        for number in range(3):
            front.send(Embed(f"small{number}", [[7, 8, 9]]))
        order = []
        for _ in range(4):
            reply = news(front)
            assert isinstance(reply, Embedded)
            order.append(reply.id)
        assert order == ["small0", "small1", "small2", "big"]


def test_cancelling_refusing_and_time_limits(bert_bundle: Path, address: str) -> None:
    with worker(bert_bundle, address, "--queue=2", "--queue-tokens=300000") as process:
        front = Front(address)
        front.wait_ready()
        wrong = {
            "too long": [[5] * 129],
            "no token": [[5], []],
            "nothing": [],
            "too many": [[5]] * 2049,
            "no such token": [[tiny.VOCAB]],
            "below": [[-1]],
        }
        for id_, inputs in wrong.items():
            front.send(Embed(id_, inputs))
            reply = news(front)
            assert isinstance(reply, Refused)
            assert (reply.id, reply.reason) == (id_, "prompt too long" if id_ == "too long" else "bad request")
        front.send(Embed("priority", [[5]], priority=101))
        front.send(Generate("text", [5], max_tokens=1))
        for id_, words in (("priority", "priority is 101"), ("text", "generates no text")):
            reply = news(front)
            assert isinstance(reply, Refused)
            assert reply.id == id_
            assert words in reply.message
        big = [[5] * 128] * 2048
        with stopped(process):
            front.send(Embed("big", big, total_seconds=600))
            front.send(Embed("too much", big))
            front.send(Embed("hasty", [[5] * 9], queue_seconds=1e-9, priority=100))
            front.send(Embed("one", [[5] * 5] * 9, priority=99))
            front.send(Embed("two", [[5] * 5] * 9, priority=99))
            front.send(Embed("one too many", [[5] * 5]))
            front.send(Cancel("big"))
            front.send(Cancel("never heard of"))
        came: dict[str, str] = {}
        while len(came) < 6:
            reply = news(front)
            if isinstance(reply, Refused):
                came[reply.id] = reply.reason
            elif isinstance(reply, Embedded):
                came[reply.id] = "done"
            elif isinstance(reply, Progress):
                came |= {row.id: str(row.finish) for row in reply.rows}
        assert came["big"] == "cancelled"
        assert came["too much"] == "queue full"
        assert came["hasty"] == "timeout"
        assert "queue full" in (came["two"], came["one too many"])
        front.send(Embed("cut", big, total_seconds=0.03))
        reply = news(front)
        assert isinstance(reply, Progress)
        assert reply.rows[0].finish == "timeout"
        assert "of 2048 texts were computed" in reply.rows[0].message


def test_a_front_end_that_dies_frees_the_engine(bert_bundle: Path, address: str) -> None:
    with worker(bert_bundle, address):
        dying, living = Front(address), Front(address)
        dying.wait_ready()
        living.wait_ready()
        for number in range(8):
            dying.send(Embed(f"big-{number}", [[5] * 128] * 2048))
        while not living.beat().running:
            pass
        dying.socket.close()
        deadline = time.monotonic() + HANGS_SECONDS
        while living.beat().running:
            assert time.monotonic() < deadline, "the dead front end's request still runs"
        living.send(Embed("mine", [[5]]))
        assert isinstance(news(living), Embedded)


def test_a_worker_for_text_refuses_embeddings_in_words(tiny_bundle: Path, address: str) -> None:
    with worker(tiny_bundle, address):
        front = Front(address)
        front.wait_ready()
        front.send(Embed("a", [[5]]))
        reply = news(front)
        assert isinstance(reply, Refused)
        assert "gives no embeddings" in reply.message


def test_a_shorter_context_is_kept_and_a_longer_one_is_the_models(bert_bundle: Path, address: str) -> None:
    for number, (wanted, got) in enumerate(((64, 64), (4096, 128))):
        with worker(bert_bundle, f"{address}{number}", f"--context={wanted}"):
            assert Front(f"{address}{number}").wait_ready().context == got


def test_a_damaged_bundle_ends_the_worker_with_a_sentence(bert_bundle: Path, address: str, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in bert_bundle.rglob("*"):
        if file.is_file():
            target = damaged / file.relative_to(bert_bundle)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    weights = damaged / "cpu-fp32" / "weights.bin"
    raw = bytearray(weights.read_bytes())
    raw[5000] ^= 1
    weights.write_bytes(raw)
    with worker(damaged, address) as process:
        _, complaint = process.communicate(timeout=HANGS_SECONDS)
    assert process.returncode == 2
    assert b"is not the file that was exported" in complaint


def test_an_engine_for_text_refuses_the_bundle_in_words(bert_bundle: Path) -> None:
    with pytest.raises(EngineError, match="is for feature-extraction; this engine generates text"):
        ort.load(bert_bundle, slots=1, context=None)


def test_the_manifest_says_what_the_model_is_for(bert_bundle: Path) -> None:
    manifest = bundle.read(bert_bundle)
    assert (manifest.task, manifest.pooling) == ("feature-extraction", "cls")
    assert manifest.encoder == bundle.Encoder(dimensions=64, normalized=True, heads=4, width=192)
    assert manifest.variants[0].verification is not None
    assert manifest.variants[0].verification.cosine == pytest.approx(1, abs=1e-5)
