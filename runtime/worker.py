"""The worker process: one engine, its loop, and a socket. `python -m runtime.worker --help`."""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import zmq

from runtime import devices, encoder, kernels, logs, messages, orphan
from runtime.bundle import MANIFEST, TOKENIZER, Bundle, BundleError, Variant, read, sha256
from runtime.devices import CPU_SLOTS, GPU_MEMORY, DeviceError
from runtime.draft import Drafter
from runtime.embedding_loop import Done, EmbeddingLoop
from runtime.engine import DeviceLost, EngineError
from runtime.grammar import Grammars
from runtime.loading import MOST_SLOTS, Placement, default_cache, start
from runtime.loop import QUEUE_FILLS, Loop, News
from runtime.messages import (
    Attach,
    Cancel,
    Embed,
    Generate,
    Heartbeat,
    HeartbeatAnswer,
    HeartbeatRequest,
    Progress,
    Ready,
    Refused,
)

log = logging.getLogger("engineshed.worker")

BAD_BUNDLE = 2
"""Exit status when the engine cannot be loaded at all; starting again would not help."""
LOST_DEVICE = 3
"""Exit status when the device fails while the engine runs."""
_OOM_SCORE = 500
"""Added to the kernel's thousandths when memory is out and it looks for whom to kill: an engine, which the server replaces."""
_OUTBOX = 10_000
"""Messages that may wait for a front end; one that is further behind is taken for gone."""


class Worker:
    """Serves `loop` to the front ends that attach to a ROUTER socket bound at `address`."""

    def __init__(self, loop: Loop | EmbeddingLoop, ready: Ready, address: str) -> None:
        self._loop, self._ready = loop, ready
        self._fronts: set[bytes] = set()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a front end that is gone fails instead of vanishing
        self._socket.setsockopt(zmq.SNDHWM, _OUTBOX)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._heartbeat_due = 0.0
        self._proven = False
        """Whether a heartbeat has told that a request was answered: a worker that did so and dies is started anew, always."""

    def run(self, parent: int | None = None) -> None:
        """Serve until the pipe `parent` is closed by the process at its other end (never, where None)."""
        if parent is not None:
            self._poller.register(parent, zmq.POLLIN)
        while True:
            events = dict(self._poller.poll(0 if self._loop.busy else int(messages.HEARTBEAT_SECONDS * 1000)))
            if parent is not None and parent in events and not os.read(parent, 1024):
                return
            if self._socket in events:
                self._receive()
            if self._loop.busy:
                self._publish(self._loop.step())
            else:
                self._loop.check()
            if time.monotonic() >= self._heartbeat_due or self._proven != bool(self._loop.counters.finished):
                self._beat()

    def _receive(self) -> None:
        while True:
            try:
                owner, frame = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:
                log.warning("ignored a message of a wrong number of frames")
                continue
            try:
                request = messages.decode_request(frame)
            except ValueError as error:
                log.warning("ignored a message that is none of the protocol: %s", error)
                continue
            self._handle(owner, request)

    def _handle(self, owner: bytes, request: messages.Request) -> None:
        match request:
            case Attach():
                self._fronts.add(owner)
                self._send(owner, self._ready)
            case Generate() | Embed():
                refused = self._submit(owner, request)
                if refused is not None:
                    self._send(owner, refused)
            case Cancel():
                news = self._loop.cancel(owner, request.id)
                if news is not None:
                    self._publish([news])
            case HeartbeatRequest(number):
                self._send(owner, HeartbeatAnswer(number, self._heartbeat()))

    def _submit(self, owner: bytes, request: Generate | Embed) -> Refused | None:
        """Have the loop take `request`, or say why not."""
        if isinstance(self._loop, Loop):
            if isinstance(request, Generate):
                return self._loop.submit(owner, request)
            return Refused(request.id, "bad request", f"the model {self._ready.model!r} generates text and gives no embeddings")
        if isinstance(request, Embed):
            return self._loop.submit(owner, request)
        return Refused(request.id, "bad request", f"the model {self._ready.model!r} gives embeddings and generates no text")

    def _publish(self, news: Sequence[News | Done]) -> None:
        """One message for each front end with all its rows, and one for each request's embeddings."""
        rows: dict[bytes, list[messages.Row]] = {}
        for item in news:
            if isinstance(item, Done):
                self._send(item.owner, item.embedded)
            else:
                rows.setdefault(item.owner, []).append(item.row)
        for owner, its in rows.items():
            self._send(owner, Progress(its))

    def _send(self, owner: bytes, reply: messages.Reply) -> None:
        try:
            self._socket.send_multipart([owner, messages.encode(reply)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.warning("front end %s is gone (%s); its requests are cancelled", owner.hex()[:8], error)
            self._fronts.discard(owner)
            self._loop.cancel_all(owner)

    def _beat(self) -> None:
        self._heartbeat_due = time.monotonic() + messages.HEARTBEAT_SECONDS
        self._proven = bool(self._loop.counters.finished)
        beat = self._heartbeat()
        for owner in list(self._fronts):
            self._send(owner, beat)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            running=self._loop.running,
            waiting=self._loop.waiting,
            waiting_tokens=self._loop.waiting_tokens,
            kv_tokens=self._loop.kv_tokens,
            **asdict(self._loop.counters),
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="runtime.worker", description="Run one engine and serve it on a ZeroMQ socket.")
    parser.add_argument("--bundle", type=Path, required=True, help="folder of the engine bundle")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:N (default cpu)")
    parser.add_argument("--variant", help="variant to run, as cpu-int4 (default: the best for the device)")
    parser.add_argument(
        "--slots",
        type=int,
        help=f"requests that decode together (default {CPU_SLOTS}; on a GPU what its memory holds, at most {MOST_SLOTS})",
    )
    parser.add_argument("--context", type=int, help="tokens a slot holds (default: what the model was made for)")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait for a slot (default 64)")
    parser.add_argument(
        "--queue-tokens",
        type=int,
        default=0,
        help="tokens that may wait, prompts and the longest answers together; who finds nobody waiting is taken in any case "
        f"(default 0: {QUEUE_FILLS} x slots x context)",
    )
    parser.add_argument("--prefill-budget", type=int, help="prompt tokens between two decode steps (default: two full steps)")
    parser.add_argument("--no-speculation", action="store_true", help="never guess tokens to verify several in one step")
    parser.add_argument("--draft", type=Path, help="folder of a smaller model's bundle with the same tokenizer, to guess with")
    parser.add_argument("--draft-variant", help="variant of it (default: the best for the device)")
    parser.add_argument("--threads", type=int, default=0, help="threads of an engine on the CPU (default: all cores)")
    parser.add_argument("--build", help="hash of the manifest that the bundle must have (default: any)")
    parser.add_argument("--cores", type=_cores, help="cores to run on, and no others, as 0,1 (default: all that it is given)")
    parser.add_argument(
        "--gpu-memory", type=float, default=GPU_MEMORY, help=f"share of a GPU's memory to take at most (default {GPU_MEMORY})"
    )
    parser.add_argument(
        "--provider",
        choices=["cuda", "tensorrt", "tensorrt-rtx"],
        default="cuda",
        help="ONNX Runtime's provider that runs a variant for cuda (default cuda)",
    )
    parser.add_argument("--build-on-load", action="store_true", help="build a plan that is for another GPU or TensorRT anew")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder for what is built on load (default %(default)s)"
    )
    parser.add_argument("--socket", required=True, help="ZeroMQ address to bind, as ipc:///run/engine.sock")
    parser.add_argument("--parent", type=int, help="process that started this one, at whose death it is killed (only on Linux)")
    parser.add_argument("--log-format", default="text", choices=logs.FORMATS)
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser.parse_args()


def _cores(text: str) -> set[int]:
    """The value of `--cores`; raises ValueError."""
    return {int(core) for core in text.split(",")}


def _pin(cores: set[int]) -> None:
    """Keep this process and every thread that it will start on `cores`. Raises DeviceError where it may not use one."""
    allowed = os.sched_getaffinity(0)
    if not cores <= allowed:  # of which the kernel would say nothing as long as there is another one
        raise DeviceError(
            f"core {min(cores - allowed)} of --cores is none that this process may use; "
            f"take some of {','.join(map(str, sorted(allowed)))}"
        )
    os.sched_setaffinity(0, cores)


def _yield_memory() -> None:
    """Have the kernel kill this process before the server where memory is out; where that is not allowed, it chooses itself."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))


def _draft(arguments: argparse.Namespace, manifest: Bundle, place: Placement) -> tuple[Bundle, Variant] | None:
    """The bundle of `--draft` and its variant, if there is one. Raises BundleError."""
    if arguments.draft is None or arguments.no_speculation:
        return None
    draft = read(arguments.draft)
    if draft.tokenizer != manifest.tokenizer:
        raise BundleError(
            f"bundle {draft.name!r} has another tokenizer than {manifest.name!r}, so it cannot draft for it; "
            "take a smaller model of the same family"
        )
    return draft, draft.for_device(place.device.kind, arguments.draft_variant)


def _loop(arguments: argparse.Namespace) -> tuple[Loop | EmbeddingLoop, Ready]:
    """The loop over the engine that the command line asks for, and what to say of it. Raises what `loading.start` does."""
    manifest = read(arguments.bundle)
    if arguments.build is not None and sha256(arguments.bundle / MANIFEST) != arguments.build:
        raise BundleError(f"the bundle {arguments.bundle} has been built anew; reload the model to serve it as it is now")
    return _embedding(arguments, manifest) if manifest.task == "feature-extraction" else _generating(arguments, manifest)


def _embedding(arguments: argparse.Namespace, manifest: Bundle) -> tuple[EmbeddingLoop, Ready]:
    variant = manifest.for_device(devices.parse(arguments.device).kind, arguments.variant)
    engine = encoder.start(arguments.bundle, manifest, variant, context=arguments.context, threads=arguments.threads)
    ready = Ready(
        model=manifest.name,
        variant=variant.name,
        slots=1,  # one batch at a time
        context=engine.context,
        queue=arguments.queue,
        vocab_size=engine.vocab_size,
        pid=os.getpid(),
        kernels=kernels.describe(variant, devices.parse(arguments.device)),
    )
    return EmbeddingLoop(engine, queue=arguments.queue, queue_tokens=arguments.queue_tokens), ready


def _generating(arguments: argparse.Namespace, manifest: Bundle) -> tuple[Loop, Ready]:
    place = Placement(
        device=devices.parse(arguments.device),
        slots=arguments.slots,
        context=arguments.context,
        threads=arguments.threads,
        gpu_memory=arguments.gpu_memory,
        provider=arguments.provider,
        build_on_load=arguments.build_on_load,
        cache=arguments.cache,
    )
    variant = manifest.for_device(place.device.kind, arguments.variant)
    guessing = _draft(arguments, manifest, place)
    computing = kernels.describe(variant, place.device, place.provider)  # while all GPUs are to be seen
    engine = start(arguments.bundle, manifest, variant, place, beside=None if guessing is None else guessing[1])
    drafter = None
    if guessing is not None:
        alike = replace(place, slots=engine.slots, context=engine.context)
        drafter = Drafter(start(arguments.draft, *guessing, alike), engine)
    ready = Ready(
        model=manifest.name,
        variant=variant.name,
        slots=engine.slots,
        context=engine.context,
        queue=arguments.queue,
        vocab_size=engine.vocab_size,
        pid=os.getpid(),
        kernels=computing,
    )
    loop = Loop(
        engine,
        queue=arguments.queue,
        queue_tokens=arguments.queue_tokens,
        prefill_budget=arguments.prefill_budget,
        speculation=not arguments.no_speculation,
        drafter=drafter,
        grammars=Grammars(arguments.bundle / TOKENIZER, engine.vocab_size, manifest.stop_ids),
    )
    return loop, ready


def main() -> int:
    """The process: load, bind, serve until the parent's pipe closes. Exit status 2 when the engine cannot be loaded."""
    arguments = _arguments()
    if arguments.parent is not None:
        orphan.die_with(arguments.parent)
    _yield_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    logs.setup(arguments.log_level, arguments.log_format)
    try:
        if arguments.cores is not None:
            _pin(arguments.cores)
        loop, ready = _loop(arguments)
    except (BundleError, DeviceError, EngineError) as error:
        print(f"engineshed: {error}", file=sys.stderr)
        return BAD_BUNDLE
    try:
        Worker(loop, ready, arguments.socket).run(parent=sys.stdin.fileno())
    except DeviceLost as error:  # a new process may find the device well again
        log.error("%s", error)
        return LOST_DEVICE
    loop.engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
