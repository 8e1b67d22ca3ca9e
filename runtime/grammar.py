"""What answers must be: constraints compiled by llguidance, and which tokens each answer may go on with.

A mask takes microseconds, rarely milliseconds. Those of a step are computed in a thread as soon as the tokens before them are
known, while the loop sends these off and computes prompts; llguidance needs no GIL for it. Only to take a token, which is
cheap, happens on the loop's own thread.

A compiled grammar grows while it is used, by states of its lexer, so no two answers share one: none can use up what another
needs, or waits for it. Whoever is done hands it back; the mask of its beginning is then found once more, in a thread that
nothing waits for, and the next answer with the same constraint begins with it at once.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from runtime.engine import Int32
from runtime.messages import Constraint
from runtime.speculation import MOST_GUESSES

if TYPE_CHECKING:  # 15 ms of a worker's start, which many never need
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = 0.02
"""Seconds that a step waits for masks. Whose mask takes longer sits the step out, so that one request's grammar does not hold
up the streams of all."""
SLOW = 0.002
"""Seconds from which on an answer's masks are computed apart from those of others, which would wait for them."""
IDLE = 32
"""Compiled grammars that are kept for the next answer with the same constraint: 0.1 MB each before they are used, with
thousands of alternatives 2 MB."""
IDLE_TOKENS = 1500
"""Tokens that these took, all together: one can leave 0.12 MB of lexer states behind, which comes to 180 MB. Most schemas grow
by less than 0.2 MB in 1,000 tokens."""

_REUSED_TOKENS = 1000
"""Tokens after which a compiled grammar is not used again."""
_LEXER_STATES = 64_000
"""Of one grammar, 1 to 2 kB each. A string of 8,000 characters, each counted, takes 50,000; llguidance's default is 250,000."""
_COMPILERS = 2
_MASKERS = 2
_STACK = 64 << 20
"""Bytes of stack of the threads that compile, by recursion: far more than constraints are tried out on (`server.compiling`).
What is not used takes no memory."""

_JSON: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "item_separator": ",[ ]?",
    "key_separator": ":[ ]?",
    "coerce_one_of": False,
    "lenient": False,
}
"""JSON stands on one line, with a blank behind commas and colons or without. Where any whitespace is allowed, a small model
that has lost its way writes blanks and line ends until max_tokens, all of them valid, and hardly a token is certain any more.
What cannot be enforced is refused rather than ignored, so that an answer fits its schema."""
_PLAINLY = {
    "NoExtensionBias": "no text can meet it",
    "oneOf constraints are not supported": "oneOf is taken only where its alternatives exclude one another plainly; use anyOf",
    "lexer precomputation failed": "it is too complex",
    # Text that is certain is tokenized, and what spells a special token out becomes that token.
    'Parser Error: token "': "it demands a text that is the name of one of the model's special tokens",
}
"""What llguidance's messages mean, by how they begin."""


class GrammarError(Exception):
    """A constraint cannot be compiled, or no answer can meet it; the message is the reason, mostly in llguidance's words."""


def vocabulary(path: Path, vocab_size: int, stop_ids: Iterable[int]) -> "LLTokenizer":
    """The tokens that answers are made of: those of the `tokenizer.json` at `path`, filled up to the engine's `vocab_size`
    with tokens that have no text. `stop_ids` end an answer that is complete. Raises GrammarError.
    """
    from llguidance import LLTokenizer

    try:
        return LLTokenizer(path.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=list(stop_ids) or None)
    except Exception as error:  # llguidance raises nothing more specific
        raise GrammarError(f"the tokens of this model cannot be constrained ({error})") from error


def compiled(tokens: "LLTokenizer", constraint: Constraint, *, steps: int = 1) -> "LLMatcher":
    """The grammar of `constraint` at its beginning, along which some text of `steps` tokens can go. Raises GrammarError.

    llguidance's limits do not bound its time and memory in every case, nor the stack that it takes: what comes from a client
    has been compiled before in a process that can be killed (`server.checker`).
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=_LEXER_STATES, verbose_errors=False)
    try:
        grammar = LLMatcher(tokens, _source(constraint), log_level=0, limits=limits)
    except ValueError as error:
        raise GrammarError(str(error)) from error
    if not grammar.is_error():
        _probe(grammar, Masks(tokens.vocab_size, 1), steps)
    if grammar.is_error():
        raise GrammarError(flaw(grammar))
    return grammar


def _source(constraint: Constraint) -> str:
    """`constraint` as llguidance has it."""
    from llguidance import LLMatcher

    match constraint.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(constraint.source, overrides=_JSON)
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.source)
        case "lark":
            if constraint.source.lstrip().startswith("{"):  # llguidance would take it for its own form of several grammars
                raise GrammarError("it begins with a brace, and a grammar with a rule")
            return constraint.source


def _probe(grammar: "LLMatcher", masks: "Masks", steps: int) -> None:
    """Go along some text of `steps` tokens, any but always the same, and back; an error stays with `grammar`."""
    chance, taken = random.Random(steps), 0
    while taken < steps and not grammar.is_stopped():
        masks.fill(grammar)
        allowed = masks.tokens()
        if grammar.is_error() or not allowed or not grammar.consume_token(chance.choice(allowed)):
            return
        taken += 1
    if not grammar.is_error() and not grammar.rollback(taken):
        raise GrammarError("max_tokens and stop, of a rule, are not served; use suffix or lazy, and the request's max_tokens")


def flaw(grammar: "LLMatcher") -> str:
    """Why `grammar` has failed, in one line: without the source, the states and the backtrace that llguidance appends."""
    lines = grammar.get_error().strip().splitlines() or ["llguidance does not say why"]
    of_regex = next((line for line in lines if line.startswith("error: ")), None)
    if of_regex is not None:
        return of_regex.removeprefix("error: ")
    return next((plain for start, plain in _PLAINLY.items() if lines[0].startswith(start)), lines[0])


class Masks:
    """Room for `count` masks of `vocab_size` tokens: bit t % 32 of word t // 32 says whether token t may come."""

    def __init__(self, vocab_size: int, count: int) -> None:
        self.rows = np.zeros((count, -(-vocab_size // 32)), np.int32)
        """[count, ceil(vocab / 32)]."""
        self._bytes = self.rows.shape[1] * self.rows.itemsize
        self._address = self.rows.ctypes.data

    def fill(self, grammar: "LLMatcher", row: int = 0) -> None:
        """Find out what `grammar` allows next; the stop tokens where it has failed. Other threads run meanwhile."""
        grammar.unsafe_compute_mask_ptr(self._address + row * self._bytes, self._bytes)

    def allows(self, token: int, row: int = 0) -> bool:
        """Whether `token` may come."""
        return bool(self.rows[row, token // 32] >> token % 32 & 1)

    def tokens(self, row: int = 0) -> list[int]:
        """All tokens that may come."""
        found: list[int] = np.flatnonzero(np.unpackbits(self.rows[row].view(np.uint8), bitorder="little")).tolist()
        return found


class Matcher:
    """One answer's way through its grammar: the loop's, but for `look`, which runs in a thread while the loop does not ask."""

    def __init__(
        self,
        constraint: Constraint,
        grammar: "LLMatcher",
        vocab_size: int,
        stop_ids: frozenset[int],
    ) -> None:
        self.constraint = constraint
        self.grammar = grammar
        self.stop_ids = stop_ids
        """Tokens that end the answer where it is complete."""
        self.taken = 0
        """Tokens that the grammar took, those of earlier answers among them."""
        self.failure = ""
        """Why the answer cannot go on; once there is a reason, nothing else here means anything."""
        self._masks = Masks(vocab_size, 1 + MOST_GUESSES)
        self._forced: list[int] = []
        self.slow = False
        """It took long to find out last time."""
        self.looking: Future[None] | None = None
        """What runs `look`, now or earlier."""

    def ready(self, deadline: float) -> bool:
        """Whether `mask` and `forced` are there; waits for them until time.monotonic() is `deadline`."""
        looking = self.looking
        if looking is None or looking.done():
            return True
        wait([looking], max(0.0, deadline - time.monotonic()))
        return looking.done()

    @property
    def forced(self) -> list[int]:
        """The next tokens as far as there is no choice, at most `MOST_GUESSES`; to be asked for when it is `ready`."""
        return self._forced

    def mask(self, later: int = 0) -> Int32:
        """[ceil(vocab / 32)]: which tokens may come behind the first `later` of `forced`, as `runtime.engine.Draw.mask` has
        it; to be asked for when it is `ready`.
        """
        mask: Int32 = self._masks.rows[later]
        return mask

    def take(self, token: int) -> bool:
        """Go on with `token`; True where nothing more may come, because the answer is complete or there is a `failure`."""
        self.taken += 1
        if not self.grammar.consume_token(token):
            self.failure = flaw(self.grammar)
        return bool(self.failure) or self.grammar.is_stopped()

    def begin(self) -> None:
        """Go back to the beginning, and find out what may come there. What fails is a `failure`."""
        if self.grammar.reset():
            self.look()
        else:
            self.failure = flaw(self.grammar)

    def look(self) -> None:
        """Find out what may come next. What fails is a `failure`: nobody may go on with what was found out before."""
        try:
            self._look()
        except Exception as error:
            log.exception("a mask could not be computed")
            self.failure = f"what may come next could not be computed ({error})"
            self._forced = []

    def _look(self) -> None:
        start = time.perf_counter()
        grammar, masks = self.grammar, self._masks
        forced = grammar.compute_ff_tokens()[:MOST_GUESSES]
        certain = 0
        masks.fill(grammar)
        while certain < len(forced) and masks.allows(forced[certain], certain) and grammar.consume_token(forced[certain]):
            certain += 1
            masks.fill(grammar, certain)
        if certain:
            grammar.rollback(certain)
        self._forced = forced[:certain]
        if grammar.is_error():  # the mask then has the stop tokens, which are not to be taken for the answer's end
            self.failure = flaw(grammar)
        self.slow = time.perf_counter() - start > SLOW


class Grammars:
    """Compiles constraints for the answers of one engine, in threads of its own. Nothing is loaded before the first one."""

    def __init__(self, path: Path, vocab_size: int, stop_ids: Iterable[int]) -> None:
        """`path` is the bundle's tokenizer.json; `vocab_size` is the width of the engine's logits; `stop_ids` end an answer."""
        self.stop_ids = frozenset(stop_ids)
        self._path, self._vocab_size = path, vocab_size
        self._compilers = ThreadPoolExecutor(_COMPILERS, "compile")
        self._maskers = ThreadPoolExecutor(_MASKERS, "mask")
        self._tokens: LLTokenizer | None = None
        self._loading = threading.Lock()
        self._idle: list[Matcher] = []
        """At their beginnings, and they have looked; the one that was used last is the last."""
        self._changing = threading.Lock()
        """Of `_idle`."""

    def matcher(self, constraint: Constraint) -> "Future[Matcher]":
        """The way of a new answer through the grammar of `constraint`, which has looked; the future may raise GrammarError."""
        with self._changing:
            idle = next((matcher for matcher in reversed(self._idle) if matcher.constraint == constraint), None)
            if idle is not None:
                self._idle.remove(idle)
        if idle is None:
            return self._later(self._compile, constraint)
        at_once: Future[Matcher] = Future()
        at_once.set_result(idle)
        return at_once

    def look(self, matchers: list[Matcher]) -> None:
        """Have `matchers` find out what may come next."""
        quick = [matcher for matcher in matchers if not matcher.slow]
        for job in ([quick] if quick else []) + [[matcher] for matcher in matchers if matcher.slow]:
            looking = self._maskers.submit(_look, job)
            for matcher in job:
                matcher.looking = looking

    def give_back(self, matcher: Matcher) -> None:
        """The answer that had `matcher` has ended, in whatever way."""
        if matcher.looking is None:
            self._restart(matcher)
        else:  # once nothing is computed for it any more
            matcher.looking.add_done_callback(lambda _: self._restart(matcher))

    def close(self) -> None:
        """Forget what waits to be compiled."""
        for threads in (self._compilers, self._maskers):
            threads.shutdown(wait=False, cancel_futures=True)

    def _later(self, work: Callable[..., T], *arguments: Any) -> "Future[T]":
        threading.stack_size(_STACK)  # of the threads that are started from now on
        return self._compilers.submit(work, *arguments)

    def _words(self) -> "LLTokenizer":
        """The model's tokens, loaded for the first constraint: while that goes on no other Python runs, 0.25 s with 49,000 of
        them. Few workers ever need them, and 60 MB each would be much for those that do not.
        """
        with self._loading:
            if self._tokens is None:
                self._tokens = vocabulary(self._path, self._vocab_size, self.stop_ids)
            return self._tokens

    def _compile(self, constraint: Constraint) -> Matcher:
        matcher = Matcher(constraint, compiled(self._words(), constraint), self._vocab_size, self.stop_ids)
        matcher.look()
        if matcher.failure:
            raise GrammarError(matcher.failure)
        return matcher

    def _restart(self, matcher: Matcher) -> None:
        if not matcher.failure and matcher.taken < _REUSED_TOKENS:
            with suppress(RuntimeError):  # where no more threads are to be had, since this is closed
                self._later(self._keep, matcher)

    def _keep(self, matcher: Matcher) -> None:
        matcher.begin()
        if matcher.failure:
            return
        with self._changing:
            kept = [*self._idle[-IDLE + 1 :], matcher]
            while sum(each.taken for each in kept) > IDLE_TOKENS:
                del kept[0]
            self._idle = kept


def _look(matchers: list[Matcher]) -> None:
    for matcher in matchers:
        matcher.look()
