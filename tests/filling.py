"""A worker whose slots are filled to their last token, and the most memory that it ever had."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import zmq

from runtime import messages
from runtime.messages import Attach, Generate, Progress, Ready, Refused

ROOT = Path(__file__).parents[1]


def peak(folder: Path, variant: str, slots: int, context: int, address: str) -> int:
    """The most bytes resident of a worker for the bundle in `folder` that answers `slots` random prompts at once, each of which
    fills its slot; twice over.
    """
    options = [f"--bundle={folder}", f"--variant={variant}", f"--slots={slots}", f"--context={context}"]
    command = [sys.executable, "-m", "runtime.worker", *options, f"--socket={address}", "--no-speculation"]
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) as process, socket:
        socket.connect(address)
        socket.send(messages.encode(Attach()))
        ready = _next(socket)
        assert isinstance(ready, Ready)
        random = np.random.default_rng(1)
        for number in range(2 * slots):
            prompt = random.integers(3, ready.vocab_size, context - 9).tolist()
            socket.send(messages.encode(Generate(str(number), prompt, max_tokens=8)))
        left = 2 * slots
        while left:
            reply = _next(socket)
            assert not isinstance(reply, Refused), reply
            if isinstance(reply, Progress):
                left -= sum(row.finish is not None for row in reply.rows)
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert process.stdin is not None
        process.stdin.close()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def _next(socket: "zmq.Socket[bytes]") -> messages.Reply:
    assert socket.poll(120_000), "the worker says nothing"
    return messages.decode_reply(socket.recv())
