"""The worker process as a front end meets it: a socket, messages, life and death."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import onnxruntime
import psutil
import pytest
import zmq

from runtime import bundle, messages
from runtime.messages import (
    Attach,
    Cancel,
    Generate,
    Heartbeat,
    HeartbeatAnswer,
    HeartbeatRequest,
    Progress,
    Ready,
    Refused,
    Reply,
    Row,
)
from tests.unit.test_orphan import gone
from tests.waiting import HANGS_SECONDS

ROOT = Path(__file__).parents[2]


class Front:
    """A front end: a DEALER socket that keeps what is of no interest yet."""

    def __init__(self, address: str) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)
        self._asked = 0

    def send(self, message: messages.Request) -> None:
        self.socket.send(messages.encode(message))

    def receive(self, seconds: float = HANGS_SECONDS) -> Reply:
        assert self.socket.poll(int(seconds * 1000)), f"nothing came within {seconds} s"
        return messages.decode_reply(self.socket.recv())

    def wait_ready(self) -> Ready:
        self.send(Attach())
        while not isinstance(reply := self.receive(), Ready):
            pass
        return reply

    def rows(self, request_id: str) -> list[Row]:
        """The rows of a request up to its finish."""
        rows: list[Row] = []
        while not rows or rows[-1].finish is None:
            reply = self.receive()
            if isinstance(reply, Progress):
                rows += [row for row in reply.rows if row.id == request_id]
        return rows

    def beat(self) -> Heartbeat:
        """What the worker holds when it has read all that was sent before."""
        self._asked += 1
        self.send(HeartbeatRequest(self._asked))
        while not (isinstance(reply := self.receive(), HeartbeatAnswer) and reply.number == self._asked):
            pass
        return reply.heartbeat


@contextmanager
def worker(folder: Path, address: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "runtime.worker", f"--bundle={folder}", "--variant=cpu-fp32", f"--socket={address}"]
    defaults = ["--slots=2", "--context=256", "--queue=1", "--threads=1"]
    process = subprocess.Popen([*command, *defaults, *options], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait(HANGS_SECONDS)


@contextmanager
def stopped(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """The worker stands still, and finds all that is sent meanwhile at once."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/worker.sock"


def test_a_request_runs_and_the_heartbeat_counts_it(tiny_bundle: Path, address: str) -> None:
    with worker(tiny_bundle, address):
        front = Front(address)
        ready = front.wait_ready()
        assert (ready.slots, ready.context, ready.queue) == (2, 256, 1)
        assert ready.kernels.startswith(f"onnxruntime {onnxruntime.__version__} on ")
        front.send(Generate("a", [5, 6, 7], max_tokens=4))
        rows = front.rows("a")
        assert sum(len(row.tokens) for row in rows) == 4
        assert rows[-1].finish == "length"
        beat = front.beat()
        assert (beat.running, beat.waiting, beat.prompt_tokens, beat.generated_tokens, beat.finished) == (0, 0, 3, 4, 1)
        assert (sum(beat.queue_counts), sum(beat.step_counts), sum(beat.batch_counts)) == (1, beat.steps, beat.decode_steps)


def test_guesses_are_counted_and_can_be_turned_off(tiny_bundle: Path, address: str) -> None:
    request = Generate("a", [5, 6, 7], max_tokens=60)
    answered: list[list[int]] = []
    for number, options in enumerate(([], ["--no-speculation"], [f"--draft={tiny_bundle}", "--draft-variant=cpu-int4"])):
        with worker(tiny_bundle, f"{address}{number}", *options):
            front = Front(f"{address}{number}")
            front.wait_ready()
            front.send(msgspec.structs.replace(request, prediction=answered[0] if answered else []))
            answered.append([token for row in front.rows("a") for token in row.tokens])
            beat = front.beat()
        assert answered[-1] == answered[0]
        assert (beat.accepted_tokens > 40) is (number == 2), beat


def test_a_draft_engine_with_another_tokenizer_is_refused(tiny_bundle: Path, address: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_bundle, other)
    manifest = (other / "bundle.json").read_text()
    digest = bundle.read(other).tokenizer
    assert digest is not None
    (other / "bundle.json").write_text(manifest.replace(digest, "0" * 64))
    with worker(tiny_bundle, address, f"--draft={other}") as process:
        _, complaint = process.communicate(timeout=HANGS_SECONDS)
    assert process.returncode == 2
    assert b"another tokenizer" in complaint


def test_two_front_ends_may_use_the_same_request_id(tiny_bundle: Path, address: str) -> None:
    with worker(tiny_bundle, address):
        one, two = Front(address), Front(address)
        one.wait_ready()
        two.wait_ready()
        one.send(Generate("same", [5, 6, 7], max_tokens=9))
        two.send(Generate("same", [9, 9], max_tokens=5))
        assert sum(len(row.tokens) for row in two.rows("same")) == 5
        assert sum(len(row.tokens) for row in one.rows("same")) == 9


def test_cancelling_and_refusing(tiny_bundle: Path, address: str) -> None:
    with worker(tiny_bundle, address) as process:
        front = Front(address)
        front.wait_ready()
        with stopped(process):
            front.send(Generate("long", [5], max_tokens=250))
            front.send(Generate("too long", [5] * 256, max_tokens=1))
            front.send(Cancel("long"))
            front.send(Cancel("never heard of"))
        seen: dict[str, Reply] = {}
        while len(seen) < 2:
            reply = front.receive()
            if isinstance(reply, Refused):
                seen["refused"] = reply
            elif isinstance(reply, Progress) and reply.rows[-1].finish == "cancelled":
                seen["cancelled"] = reply
        assert isinstance(seen["refused"], Refused)
        assert seen["refused"].reason == "prompt too long"


def test_time_limits_and_the_limit_of_waiting_tokens(tiny_bundle: Path, address: str) -> None:
    with worker(tiny_bundle, address, "--slots=1", "--queue=9", "--queue-tokens=300", "--no-speculation") as process:
        front = Front(address)
        front.wait_ready()
        front.send(Generate("cut", [5] * 20, max_tokens=235, total_seconds=0.005))
        assert front.rows("cut")[-1].finish == "timeout"
        with stopped(process):
            front.send(Generate("runs", [5] * 20, max_tokens=235))
            front.send(Generate("hasty", [5], max_tokens=1, queue_seconds=0.001, priority=1))
            front.send(Generate("waits", [5] * 20, max_tokens=235))
            front.send(Generate("too much", [5] * 20, max_tokens=235, client="other"))
        came: dict[str, str] = {}
        while len(came) < 3:
            reply = front.receive()
            if isinstance(reply, Refused):
                came[reply.id] = reply.reason
            elif isinstance(reply, Progress):
                came |= {row.id: row.finish for row in reply.rows if row.finish is not None}
        assert came == {"runs": "length", "hasty": "timeout", "too much": "queue full"}
        front.send(Cancel("waits"))
        front.rows("waits")
        beat = front.beat()
        assert (beat.timeouts, beat.waiting_tokens) == (2, 0)
        assert beat.queue_seconds > 0
        assert beat.rows == beat.decode_steps > 0


def test_a_front_end_that_dies_frees_its_slots(tiny_bundle: Path, address: str) -> None:
    with worker(tiny_bundle, address):
        dying, living = Front(address), Front(address)
        dying.wait_ready()
        living.wait_ready()
        for i in range(3):
            dying.send(Generate(f"r{i}", [5], max_tokens=250))
        while not isinstance(dying.receive(), Progress):
            pass
        dying.socket.close()
        deadline = time.monotonic() + HANGS_SECONDS
        while (beat := living.beat()).running or beat.waiting:
            assert time.monotonic() < deadline, "the dead front end's requests still run"
        living.send(Generate("mine", [5], max_tokens=2))
        assert living.rows("mine")[-1].finish == "length"


def test_nonsense_on_the_socket_is_ignored(tiny_bundle: Path, address: str) -> None:
    with worker(tiny_bundle, address):
        front = Front(address)
        front.wait_ready()
        for frame in (b"", b"\xff\xff", b"{}", messages.encode(front.beat())):
            front.socket.send(frame)
        front.socket.send_multipart([b"two", b"frames"])
        front.send(Generate("a", [5], max_tokens=2))
        assert front.rows("a")[-1].finish == "length"


def test_the_worker_ends_with_its_parent_also_in_the_middle_of_work(tiny_bundle: Path, address: str) -> None:
    with worker(tiny_bundle, address) as process:
        front = Front(address)
        front.wait_ready()
        front.send(Generate("long", [5], max_tokens=250))
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(HANGS_SECONDS) == 0


def test_a_worker_that_hangs_does_not_outlive_a_parent_that_is_killed(tiny_bundle: Path, address: str) -> None:
    """Stopped, it hears nothing: neither the end of its stdin nor a signal that it could handle."""
    command = [sys.executable, "-m", "runtime.worker", f"--bundle={tiny_bundle}", f"--socket={address}", "--threads=1"]
    spawn = f"import os, subprocess; subprocess.Popen([*{command}, f'--parent={{os.getpid()}}'], stdin=subprocess.PIPE).wait()"
    with subprocess.Popen([sys.executable, "-c", spawn], cwd=ROOT) as parent:
        try:
            worker = psutil.Process(Front(address).wait_ready().pid)
            worker.suspend()
        finally:
            parent.kill()
        assert gone(worker)


def test_a_worker_stays_on_its_cores(tiny_bundle: Path, address: str) -> None:
    core = max(os.sched_getaffinity(0))
    with worker(tiny_bundle, address, f"--cores={core}", "--threads=0") as process:
        front = Front(address)
        front.wait_ready()
        front.send(Generate("a", [5], max_tokens=2))
        assert front.rows("a")[-1].finish == "length"
        assert psutil.Process(process.pid).cpu_affinity() == [core]


@pytest.mark.parametrize(("cores", "complaint"), [("0,4095", b"core 4095 of --cores is none"), ("all", b"invalid")])
def test_cores_that_there_are_not_end_the_worker_with_a_sentence(
    tmp_path: Path, address: str, cores: str, complaint: bytes
) -> None:
    with worker(tmp_path, address, f"--cores={cores}") as process:
        _, message = process.communicate(timeout=HANGS_SECONDS)
    assert process.returncode == 2
    assert complaint in message
    assert b"Traceback" not in message


def test_out_of_memory_the_kernel_takes_a_worker_before_the_server(tiny_bundle: Path, address: str) -> None:
    def score(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    with worker(tiny_bundle, address) as process:
        Front(address).wait_ready()
        assert score(process.pid) > score("self")


def test_ctrl_c_in_the_terminal_is_the_parents_affair(tiny_bundle: Path, address: str) -> None:
    with worker(tiny_bundle, address) as process:
        front = Front(address)
        front.wait_ready()
        process.send_signal(signal.SIGINT)
        front.send(Generate("a", [5], max_tokens=2))
        assert front.rows("a")[-1].finish == "length"


def test_an_engine_that_cannot_be_loaded_ends_the_worker_with_a_sentence(tmp_path: Path, address: str) -> None:
    with worker(tmp_path, address) as process:
        assert process.wait(HANGS_SECONDS) == 2
        assert process.stderr is not None
        message = process.stderr.read().decode()
        assert "no engine bundle" in message
        assert "engineshed export" in message
        assert "Traceback" not in message
