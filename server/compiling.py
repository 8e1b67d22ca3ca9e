"""A process that tries out constraints: `python -m server.compiling`, one JSON line in for each, one out.

llguidance compiles most grammars in milliseconds, and refuses many that would explode. A few take minutes, all memory or the
whole stack, which its limits do not notice and no thread survives. So each constraint is compiled in a fork of this process,
which has the tokenizer already, with limits of CPU time and memory that the kernel keeps. What passes here costs an engine's
worker no more when it compiles it in turn. Only what hits one of these limits is at fault itself; that a fork is killed or
late by the clock is due to the machine, and may be otherwise in a moment.
"""

import os
import resource
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from runtime.grammar import GrammarError, compiled, vocabulary
from runtime.messages import Constraint
from server.endless import documents, endless

if TYPE_CHECKING:
    from llguidance import LLTokenizer

CPU_SECONDS = 1
"""Of one constraint."""
WALL_SECONDS = 10.0
"""By the clock, after which a fork is stuck or the machine has no time for it."""
MEMORY = 256 << 20
"""Bytes that one may take."""
STACK = 4 << 20
"""Bytes of the stack that it is compiled on; a worker has twice that where it has least."""
AT_ONCE = 2
"""Constraints that are compiled beside one another."""
NICE = 10
"""How much they give way to everything else on the machine."""
STEPS = 32
"""Tokens of some text that must be possible: enough to meet a rule that leads nowhere."""
TOO_LONG = f"it takes more than {CPU_SECONDS} s to compile"
TOO_LARGE = "it takes too much memory to compile, or is nested too deeply"
TOO_BUSY = "the machine has too much else to do"

_NO_THREAD = 2
"""Exit status of a fork that could not begin."""
_OOM_SCORE = 1000
_TOKENIZERS = 8
"""That are kept."""


class Vocabulary(msgspec.Struct, frozen=True):
    """What a model's answers are made of."""

    path: str
    """Of its tokenizer.json."""
    sha256: str
    """Of that file."""
    vocab_size: int
    stop_ids: tuple[int, ...]


class Question(msgspec.Struct, frozen=True):
    """Can answers of `vocabulary` keep to `constraint`?"""

    id: int
    constraint: Constraint
    vocabulary: Vocabulary


class Verdict(msgspec.Struct, frozen=True):
    """The answer to question `id`."""

    id: int
    flaw: str
    """Why not; empty where they can."""
    final: bool = True
    """Whether it would be the same another time; False where nothing could be found out, for the reason in `flaw`."""


class _Trial:
    """A fork that compiles; at `deadline` it has taken too long."""

    def __init__(self, question: Question, tokens: "LLTokenizer") -> None:
        """Raises OSError where the system has no process for it."""
        self.question = question
        self.deadline = time.monotonic() + WALL_SECONDS
        self.said = b""
        self.pipe, into = os.pipe()
        try:
            self._pid = os.fork()
        except OSError:
            os.close(self.pipe)
            os.close(into)
            raise
        if self._pid == 0:
            try:
                _in_the_fork(lambda: os.write(into, _flaw(tokens, question.constraint).encode()[: select.PIPE_BUF]))
            finally:
                os._exit(1)
        os.close(into)

    def read(self) -> bool:
        """Take in what it says; True when it has ended."""
        more = os.read(self.pipe, select.PIPE_BUF)
        self.said += more
        return not more

    def end(self) -> Verdict:
        """Reap it, alive or not."""
        if time.monotonic() >= self.deadline:
            os.kill(self._pid, signal.SIGKILL)
        os.close(self.pipe)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        if code == 0:
            return Verdict(self.question.id, self.said.decode(errors="replace"))
        if code in (-signal.SIGKILL, _NO_THREAD):  # by the line above, or by the kernel where all memory is out
            return Verdict(self.question.id, TOO_BUSY, final=False)
        return Verdict(self.question.id, TOO_LONG if code == -signal.SIGXCPU else TOO_LARGE)

    def kill(self) -> None:
        """Nobody wants to know any more."""
        os.kill(self._pid, signal.SIGKILL)


def _in_the_fork(compile: Callable[[], object]) -> None:
    """Run `compile` within the limits and end this process, with status 0 where it was able to finish."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The hard limit, which ends it with SIGKILL as others do, is not to be the one that it meets.
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # where an allocation that fails is told
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY + STACK
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    threading.stack_size(STACK)
    thread = threading.Thread(target=lambda: (compile(), os._exit(0)))
    try:
        thread.start()
    except RuntimeError:
        os._exit(_NO_THREAD)
    thread.join()


def _flaw(tokens: "LLTokenizer", constraint: Constraint) -> str:
    try:
        compiled(tokens, constraint, steps=STEPS)
    except GrammarError as error:
        return str(error)
    return "it refers to itself without an end" if any(map(endless, documents(constraint))) else ""


class Trials:
    """The constraints that are being tried, and those whose turn comes later."""

    def __init__(self) -> None:
        self.running: dict[int, _Trial] = {}
        """By the pipes that they write to."""
        self._waiting: deque[Question] = deque()
        self._tokenizers: dict[Vocabulary, LLTokenizer] = {}

    @property
    def deadline(self) -> float | None:
        """Seconds until the first of them has taken too long; None where there is none."""
        if not self.running:
            return None
        return max(0.0, min(trial.deadline for trial in self.running.values()) - time.monotonic())

    def ask(self, question: Question) -> None:
        """Try it out when its turn comes."""
        self._waiting.append(question)

    def start(self) -> list[Verdict]:
        """Begin with those whose turn it is; gives the verdicts that need no trial."""
        verdicts = []
        while self._waiting and len(self.running) < AT_ONCE:
            question = self._waiting.popleft()
            try:
                trial = _Trial(question, self._tokens(question.vocabulary))
            except GrammarError as error:
                verdicts.append(Verdict(question.id, str(error)))
            except OSError as error:
                verdicts.append(Verdict(question.id, os.strerror(error.errno or 0), final=False))
            else:
                self.running[trial.pipe] = trial
        return verdicts

    def collect(self, ready: list[int]) -> list[Verdict]:
        """The verdicts on those that have ended or taken too long, `ready` being the pipes that can be read."""
        over = [pipe for pipe in ready if self.running[pipe].read()]
        over += [pipe for pipe, trial in self.running.items() if pipe not in over and time.monotonic() >= trial.deadline]
        return [self.running.pop(pipe).end() for pipe in over]

    def _tokens(self, words: Vocabulary) -> "LLTokenizer":
        if words not in self._tokenizers:
            if len(self._tokenizers) >= _TOKENIZERS:
                del self._tokenizers[next(iter(self._tokenizers))]
            self._tokenizers[words] = vocabulary(Path(words.path), words.vocab_size, words.stop_ids)
        return self._tokenizers[words]


def main() -> None:
    """Answer questions until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group
    trials, heard = Trials(), b""
    stdin, stdout = sys.stdin.fileno(), sys.stdout.buffer
    while True:
        ready, _, _ = select.select([stdin, *trials.running], [], [], trials.deadline)
        if stdin in ready:
            more = os.read(stdin, 1 << 20)
            if not more:
                break
            *lines, heard = (heard + more).split(b"\n")
            for line in lines:
                trials.ask(msgspec.json.decode(line, type=Question))
        for verdict in trials.collect([pipe for pipe in ready if pipe != stdin]) + trials.start():
            stdout.write(msgspec.json.encode(verdict) + b"\n")
        stdout.flush()
    for trial in trials.running.values():
        trial.kill()


if __name__ == "__main__":
    main()
