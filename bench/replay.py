"""A worker without an engine, for measuring what stands in front of one. `python -m bench.replay --help`.

It speaks `runtime.messages` on a ROUTER socket as `runtime.worker` does, and answers every prompt with the same tokens, over
and over. Which tokens is the caller's matter, who knows the vocabulary.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Sequence

import msgspec
import zmq

from bench.arguments import number
from runtime import messages, orphan
from runtime.messages import (
    Attach,
    Cancel,
    Finish,
    Generate,
    Heartbeat,
    HeartbeatAnswer,
    HeartbeatRequest,
    Progress,
    Ready,
    Row,
)

LOGPROB = -0.5


class Replay:
    """Answers the front ends that attach to a ROUTER socket bound at `address`: `tokens` again and again, one row a step.

    A row has `row_tokens` of them, the last of an answer perhaps fewer.
    """

    def __init__(self, address: str, ready: Ready, tokens: Sequence[int], *, row_tokens: int = 1) -> None:
        self._ready, self._row_tokens = ready, row_tokens
        self._tokens = list(tokens) * (2 + row_tokens // len(tokens))  # a row may begin with the last and go on from the first
        self._again = len(tokens)
        self._left: dict[bytes, dict[str, int]] = {}
        """By front end and request: the tokens that are still to come."""
        self._place = 0
        self._steps = 0
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)

    def run(self, parent: int, steps_per_second: float = 0.0) -> None:
        """Answer until the pipe `parent` is closed at its other end; a rate of 0 is as quickly as the socket takes them.

        Steps that came too late are not made up for, as no engine could.
        """
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(parent, zmq.POLLIN)
        pause = 1 / steps_per_second if steps_per_second else 0.0
        step_due = beat_due = time.monotonic()
        while True:
            due = step_due if any(self._left.values()) else beat_due
            events = dict(poller.poll(max(0, math.ceil((due - time.monotonic()) * 1000))))
            if parent in events and not os.read(parent, 1024):
                return
            if self._socket in events:
                self._receive()
            now = time.monotonic()
            if now >= step_due:
                self.step()
                step_due = max(step_due + pause, now)
            if now >= beat_due:
                self._beat()
                beat_due = now + messages.HEARTBEAT_SECONDS

    def step(self) -> None:
        """The next tokens of every answer, in one message for each front end."""
        tokens = self._tokens[self._place : self._place + self._row_tokens]
        self._place = (self._place + self._row_tokens) % self._again
        logprobs = [LOGPROB] * len(tokens)
        for owner, left in list(self._left.items()):
            if not left:
                continue
            rows = []
            for id_, count in list(left.items()):
                finish: Finish | None = "length" if count <= len(tokens) else None
                rows.append(Row(id_, tokens[:count], logprobs[:count], finish))
                left[id_] -= len(tokens)
                if finish is not None:
                    del left[id_]
            self._send(owner, Progress(rows))
        self._steps += 1

    def _receive(self) -> None:
        while self._socket.poll(0):
            owner, frame = self._socket.recv_multipart()
            match messages.decode_request(frame):
                case Attach():
                    self._left[owner] = {}
                    self._send(owner, self._ready)
                case Generate() as request:
                    self._left.setdefault(owner, {})[request.id] = request.max_tokens
                case Cancel(id_):
                    if self._left.get(owner, {}).pop(id_, None) is not None:
                        self._send(owner, Progress([Row(id_, [], [], "cancelled")]))
                case HeartbeatRequest(asked):
                    self._send(owner, HeartbeatAnswer(asked, self._heartbeat()))

    def _beat(self) -> None:
        for owner in list(self._left):
            self._send(owner, self._heartbeat())

    def _heartbeat(self) -> Heartbeat:
        numbers: dict[str, float] = {field.name: 0 for field in msgspec.structs.fields(Heartbeat) if field.required}
        numbers |= {"running": sum(map(len, self._left.values())), "steps": self._steps}
        return msgspec.convert(numbers, Heartbeat)

    def _send(self, owner: bytes, reply: messages.Reply) -> None:
        try:
            self._socket.send_multipart([owner, messages.encode(reply)])
        except zmq.ZMQError:  # this front end is gone
            self._left.pop(owner, None)


def main() -> int:
    """The process: bind, answer until stdin ends."""
    parser = argparse.ArgumentParser(prog="bench.replay", description="Answer prompts without an engine.")
    parser.add_argument("--socket", required=True, help="ZeroMQ address to bind, as ipc:///run/engine.sock")
    parser.add_argument("--parent", type=int, help="process that this one must not outlive")
    parser.add_argument("--tokens", type=number(int, 0), nargs="+", required=True, help="ids that every answer repeats")
    parser.add_argument("--model", default="replay", help="what it calls its model (default: %(default)s)")
    parser.add_argument("--vocab", type=number(int, 1), default=2**20, help="tokens that may be in a prompt")
    parser.add_argument("--context", type=number(int, 2), default=4096, help="tokens a slot holds (default: %(default)s)")
    parser.add_argument("--slots", type=number(int, 1), default=1024, help="requests that run at once (default: %(default)s)")
    parser.add_argument("--row-tokens", type=number(int, 1), default=1, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=number(float, 0), default=0.0, help="steps a second; 0 is as many as go (default)")
    args = parser.parse_args()
    if args.parent is not None:
        orphan.die_with(args.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    ready = Ready(
        model=args.model,
        variant="replay",
        slots=args.slots,
        context=args.context,
        queue=0,
        vocab_size=args.vocab,
        pid=os.getpid(),
    )
    Replay(args.socket, ready, args.tokens, row_tokens=args.row_tokens).run(sys.stdin.fileno(), args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
