"""A model's answer is read as it comes: what is content, what is a call.

A format's way of writing calls is a script: a generator that takes text from a `Reader` step by step, and yields where it
needs more than has come. Text that begins like a call and is none is given back as content. Once the beginning of its
arguments has been told, a call stands: where its text goes on as no JSON does the call ends, and the rest is content.

Whitespace beside a call belongs to the call's frame, not to the content: that before the first call and that behind the last
one, where nothing else stands there, is dropped.
"""

import json
from collections.abc import Callable, Collection, Generator

from server.tools.calls import Arguments, CallEnded, CallStarted, Content, Event
from server.tools.json_text import SPACE, NotJsonError, Value

Steps = Generator[None, None, None]
Script = Callable[["Reader"], Steps]

_ARGUMENTS = ("arguments", "parameters")


class FalseStartError(Exception):
    """What began like a call is none."""


class Parser:
    """The events of one answer."""

    def __init__(self, script: Script) -> None:
        self._reader = Reader()
        self._steps = script(self._reader)
        self._advance()

    @property
    def calls(self) -> int:
        """How many calls have started."""
        return self._reader.calls

    def feed(self, text: str) -> list[Event]:
        """What the answer's next piece makes certain; it may be cut anywhere."""
        self._reader.add(text)
        self._advance()
        return self._reader.take()

    def finish(self) -> list[Event]:
        """What is left, to be called when the answer has ended."""
        self._reader.close()
        self._advance()
        self._reader.say_rest()
        return self._reader.take()

    def _advance(self) -> None:
        next(self._steps, None)


class Reader:
    """The text that a script has not used yet, and the events that it has made.

    Its generators yield where they need more text than has come; behind the end of the answer they never do.
    """

    calls: int
    """How many calls have started."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0
        """The offset of what comes next; a script that has failed may set it back to where it was before."""
        self._text = ""
        self._over = False
        self._events: list[Event] = []
        self._space = ""
        """Whitespace that is content if more content follows."""
        self._beside_call = False
        """Nothing but whitespace has come since the last call."""

    # For the parser.

    def add(self, text: str) -> None:
        """More of the answer has come."""
        self._text += text

    def close(self) -> None:
        """The answer is over."""
        self._over = True

    def take(self) -> list[Event]:
        """The events since the last time."""
        events, self._events = self._events, []
        return events

    def say_rest(self) -> None:
        """Give what is left as content."""
        self.say(self._text[self.at :])
        self._text, self.at = "", 0
        if self._space and not self._beside_call:
            self._emit_content(self._space)
        self._space = ""

    # For scripts.

    def content_to(self, *marks: str) -> Generator[None, None, str | None]:
        """Give content up to the first of `marks`; the mark, behind which reading goes on, or None at the answer's end."""
        while True:
            found = [(at, -len(mark), mark) for mark in marks if (at := self._text.find(mark, self.at)) >= 0]
            certain = min(found)[0] if found else len(self._text) - (0 if self._over else self._begun(marks))
            self.say(self._text[self.at : certain])
            self._text, self.at = self._text[certain:], 0
            if found:
                mark = min(found)[2]
                self.at = len(mark)
                return mark
            if self._over:
                return None
            yield

    def say(self, text: str) -> None:
        """Give `text` as content."""
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            self._emit_content(said)

    def peek(self) -> Generator[None, None, str]:
        """The next character that is no whitespace, which becomes the next one at all; "" at the answer's end."""
        while True:
            self.at = SPACE.match(self._text, self.at).end()  # type: ignore[union-attr] # matches ""
            if self.at < len(self._text):
                return self._text[self.at]
            if self._over:
                return ""
            yield

    def literal(self, text: str) -> Generator[None, None, bool]:
        """Whether `text` comes next; if so, reading goes on behind it."""
        while not self._over and len(self._text) - self.at < len(text) and text.startswith(self._text[self.at :]):
            yield
        there = self._text.startswith(text, self.at)
        if there:
            self.at += len(text)
        return there

    def word(self, extra: str) -> Generator[None, None, str]:
        """The letters, digits and characters of `extra` that come next; "" if none does."""
        end = self.at
        while True:
            while end < len(self._text) and (self._text[end].isalnum() or self._text[end] in extra):
                end += 1
            if end < len(self._text) or self._over:
                word, self.at = self._text[self.at : end], end
                return word
            yield

    def closing(self, text: str) -> Steps:
        """Skip `text` and the whitespace before it, if it comes next."""
        behind = self.at
        yield from self.peek()
        if not (yield from self.literal(text)):
            self.at = behind

    def give_back(self, mark: str) -> None:
        """Give a mark behind which there was no call as content; reading goes on behind it."""
        self.say(mark)
        self.at = len(mark)

    def call(self, only: Collection[str] | None = None, keys: Collection[str] | None = None) -> Steps:
        """Tell a call that is written as an object with the keys "name" and "arguments" (or "parameters"), in any order.

        Raises FalseStartError where it is none, or calls none of `only`, or has a key that is not in `keys`. A call that has
        started stands, and reading goes on behind the last of it that makes sense.
        """
        name: str | None = None
        arguments: str | None = None if keys is not None else "{}"
        started, behind = False, self.at
        try:
            yield from self._need("{")
            following = yield from self.peek()
            while following != "}":
                key = yield from self._string()
                if keys is not None and key not in keys:
                    raise FalseStartError
                yield from self._need(":")
                following = yield from self.peek()
                if key == "name" and name is None:
                    name = yield from self._string()
                    if not name or not name.isprintable() or (only is not None and name not in only):
                        raise FalseStartError
                elif key in _ARGUMENTS and name is not None and not started and following == "{":
                    started = True
                    if not (yield from self.arguments(name)):
                        return
                elif key in _ARGUMENTS and not started:
                    arguments = yield from self._object()
                else:
                    yield from self._value()
                behind = self.at
                following = yield from self.peek()
                if following == ",":
                    self.at += 1
                    following = "" if (yield from self.peek()) == "}" else ","
                if following not in (",", "}"):
                    raise FalseStartError
            if not started:
                if name is None or arguments is None:
                    raise FalseStartError
                self._tell(name, arguments)
            self.at += 1
        except FalseStartError:
            if not started:
                raise
            self.at = behind

    def arguments(self, name: str) -> Generator[None, None, bool]:
        """Tell a call of `name`, whose arguments come next and begin with a brace; whether they are whole."""
        index = self._start(name)
        value, whole = Value(), True
        while not value.done and whole:
            try:
                end = value.scan(self._text, self.at, last=self._over)
                if self._over and not value.done:
                    end, whole = len(self._text), False
            except NotJsonError as error:
                end, whole = error.at, False
            self._emit_arguments(index, self._text[self.at : end])
            self._text, self.at = self._text[end:], 0
            if not value.done and whole:
                yield
        self._events.append(CallEnded(index, whole))
        return whole

    def calls_in_list(self) -> Steps:
        """Tell the calls of a JSON list; raises FalseStartError where it does not begin with one."""
        yield from self._need("[")
        yield from self.call()
        behind = self.at
        try:
            while (yield from self.peek()) == ",":
                self.at += 1
                yield from self.call()
                behind = self.at
            yield from self._need("]")
        except FalseStartError:
            self.at = behind

    def _tell(self, name: str, arguments: str) -> None:
        index = self._start(name)
        self._emit_arguments(index, arguments)
        self._events.append(CallEnded(index))

    def _start(self, name: str) -> int:
        """Tell that a call starts; its index."""
        self._space, self._beside_call = "", True
        self._events.append(CallStarted(self.calls, name))
        self.calls += 1
        return self.calls - 1

    def _need(self, character: str) -> Steps:
        if (yield from self.peek()) != character:
            raise FalseStartError
        self.at += 1

    def _string(self) -> Generator[None, None, str]:
        if (yield from self.peek()) != '"':
            raise FalseStartError
        text: str = json.loads((yield from self._value()))
        return text

    def _object(self) -> Generator[None, None, str]:
        """The text of an object, which may be in a string."""
        text = yield from self._value()
        if text.startswith('"'):
            text = json.loads(text)
            try:
                inside = Value()
                if inside.scan(text, 0, last=True) < len(text) or not inside.done:
                    raise FalseStartError
            except NotJsonError:
                raise FalseStartError from None
        if text == "null":
            return "{}"
        if not text.startswith("{"):
            raise FalseStartError
        return text

    def _value(self) -> Generator[None, None, str]:
        """The text of a whole JSON value."""
        value, end = Value(), self.at
        try:
            while True:
                end = value.scan(self._text, end, last=self._over)
                if value.done:
                    break
                if self._over:
                    raise FalseStartError
                yield
        except NotJsonError:
            raise FalseStartError from None
        text, self.at = self._text[self.at : end], end
        return text

    def _begun(self, marks: Collection[str]) -> int:
        """How many characters at the text's end may be the beginning of a mark."""
        longest = min(max(map(len, marks)) - 1, len(self._text) - self.at)
        for length in range(longest, 0, -1):
            end = self._text[-length:]
            if any(mark.startswith(end) for mark in marks):
                return length
        return 0

    def _emit_content(self, text: str) -> None:
        self._beside_call = False
        if self._events and isinstance(last := self._events[-1], Content):
            self._events[-1] = Content(last.text + text)
        else:
            self._events.append(Content(text))

    def _emit_arguments(self, index: int, text: str) -> None:
        if text:
            self._events.append(Arguments(index, text))
