"""A stand-in for `python -m runtime.worker`: a process without an engine that answers every prompt with x, x, x, ...

`--first=crash|hopeless` is what the first process of a test does instead, and `--deaf` ignores the end of stdin.
"""

import argparse
import itertools
import os
import sys
import threading
import time
from pathlib import Path

import msgspec
import zmq

from runtime import messages
from runtime.messages import Attach, Cancel, Finish, Generate, HeartbeatAnswer, HeartbeatRequest, Progress, Row
from tests.unit.server.scripted import IDLE, READY


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--first", choices=["crash", "hopeless"])
    parser.add_argument("--marker", type=Path)
    parser.add_argument("--deaf", action="store_true")
    args = parser.parse_args()
    if args.first and not args.marker.exists():
        args.marker.touch()
        sys.exit(2 if args.first == "hopeless" else 1)
    if not args.deaf:
        threading.Thread(target=_leave_with_parent, daemon=True).start()
    _answer(args.socket)


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def _answer(address: str) -> None:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    socket.bind(address)
    front_end, running = b"", dict[str, int]()
    for _ in itertools.count():
        while socket.poll(20):
            front_end, frame = socket.recv_multipart()
            match messages.decode_request(frame):
                case Attach():
                    socket.send_multipart([front_end, messages.encode(msgspec.structs.replace(READY, pid=os.getpid()))])
                case Generate(id_, _, max_tokens):
                    running[id_] = max_tokens
                case Cancel(id_):
                    running.pop(id_, None)
                case HeartbeatRequest(number):
                    beat = msgspec.structs.replace(IDLE, running=len(running))
                    socket.send_multipart([front_end, messages.encode(HeartbeatAnswer(number, beat))])
        for id_ in list(running):
            running[id_] -= 1
            finish: Finish | None = None if running[id_] else "length"
            socket.send_multipart([front_end, messages.encode(Progress([Row(id_, [ord("x") - 33], [-0.5], finish)]))])
            if finish:
                del running[id_]
        if front_end:
            socket.send_multipart([front_end, messages.encode(msgspec.structs.replace(IDLE, running=len(running)))])
        time.sleep(0.005)


if __name__ == "__main__":
    main()
