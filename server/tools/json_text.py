"""Where a JSON value ends in text that comes in pieces."""

import re


class NotJsonError(Exception):
    """The text goes on as no JSON value does; `at` is the offset of the first character that does not fit."""

    def __init__(self, at: int) -> None:
        super().__init__(f"no JSON at {at}")
        self.at = at


SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]+')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_ATOM = re.compile(r"[-+.0-9A-Za-z]+")
_WHOLE_ATOM = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_ATOM_BEGUN = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE](?:[-+]?[0-9]*)?)?)?|[eE][-+]?[0-9]*)?)?")
_WORDS = ("true", "false", "null")
_CLOSED_BY = {"{": "}", "[": "]"}


class Value:
    """One JSON value (RFC 8259), checked character by character; no whitespace before it."""

    done: bool
    """The value is whole."""

    def __init__(self) -> None:
        self.done = False
        self._open: list[str] = []
        self._expects = "value"
        self._after_string = ""

    def scan(self, text: str, at: int, *, last: bool = False) -> int:
        """How far `text` belongs to the value, from offset `at` on.

        What is behind the offset that is given has to come again, with more behind it: half an escape, a number that may
        go on. `last` says that nothing follows. Raises NotJsonError.
        """
        while not self.done:
            if self._expects == "string":
                next_ = self._string(text, at)
            else:
                at = SPACE.match(text, at).end() if self._open else at  # type: ignore[union-attr] # matches ""
                if at == len(text):
                    break
                next_ = self._lexeme(text, at, last)
            if next_ == at:
                break
            at = next_
        return at

    def _string(self, text: str, at: int) -> int:
        """On through a string, whose first quote has been read."""
        while at < len(text):
            if match := _PLAIN.match(text, at) or _ESCAPE.match(text, at):
                at = match.end()
            elif text[at] == '"':
                self._expects = self._after_string
                self.done = not self._open
                return at + 1
            elif (match := _ESCAPE_BEGUN.match(text, at)) and match.end() == len(text):
                return at
            else:
                raise NotJsonError(at)
        return at

    def _lexeme(self, text: str, at: int, last: bool) -> int:
        """One lexeme on, or not if it may not be whole yet."""
        character = text[at]
        if character == '"' and self._expects in ("value", "value or end", "key", "key or end"):
            self._after_string = "colon" if self._expects.startswith("key") else "comma or end"
            self._expects = "string"
        elif character == ":" and self._expects == "colon":
            self._expects = "value"
        elif character == "," and self._expects == "comma or end":
            self._expects = "key" if self._open[-1] == "{" else "value"
        elif character in _CLOSED_BY and self._expects in ("value", "value or end"):
            self._open.append(character)
            self._expects = "key or end" if character == "{" else "value or end"
        elif self._open and character == _CLOSED_BY[self._open[-1]] and self._expects.endswith("or end"):
            self._open.pop()
            self._ended()
        elif self._expects in ("value", "value or end"):
            return self._atom(text, at, last)
        else:
            raise NotJsonError(at)
        return at + 1

    def _atom(self, text: str, at: int, last: bool) -> int:
        match = _ATOM.match(text, at)
        if match is None:
            raise NotJsonError(at)
        ends = match.end() == len(text)
        if _WHOLE_ATOM.fullmatch(match[0]) and (last or not ends):
            self._ended()
            return match.end()
        if ends and (_ATOM_BEGUN.fullmatch(match[0]) or any(word.startswith(match[0]) for word in _WORDS)):
            return at
        raise NotJsonError(at)

    def _ended(self) -> None:
        """A value inside of this one, or this one itself, is whole."""
        self.done = not self._open
        self._expects = "comma or end"
