"""Llama 3.1 to 3.3: the answer is a bare object, perhaps behind `<|python_tag|>`; several are divided by semicolons."""

from collections.abc import Collection, Sequence

from server.tools.calls import Call
from server.tools.format import Format, literal, repeated
from server.tools.reading import FalseStartError, Reader, Steps

TAG = "<|python_tag|>"
_KEYS = frozenset({"name", "parameters", "arguments", "type", "id"})


class Llama3(Format):
    """`{"name": ..., "parameters": {...}}; {...}`.

    Without the tag only an answer that begins so is one of calls: elsewhere in a text JSON is just JSON.
    """

    special = frozenset({TAG})
    opening = TAG
    single = True

    def render(self, calls: Sequence[Call]) -> str:
        """See `Format`."""
        return "; ".join(f'{{"name": "{call.name}", "parameters": {call.arguments}}}' for call in calls)

    def _script(self, reader: Reader, names: Collection[str] | None) -> Steps:
        yield from self._bare(reader, names)
        while mark := (yield from reader.content_to(TAG)):
            try:
                yield from reader.call()
            except FalseStartError:
                reader.give_back(mark)
                continue
            yield from self._more(reader, names)

    def _bare(self, reader: Reader, names: Collection[str] | None) -> Steps:
        try:
            if (yield from reader.peek()) != "{":
                raise FalseStartError
            yield from reader.call(names, _KEYS)
        except FalseStartError:
            reader.at = 0
        else:
            yield from self._more(reader, names)

    def _more(self, reader: Reader, names: Collection[str] | None) -> Steps:
        """The calls behind the first."""
        behind = reader.at
        try:
            while following := (yield from reader.peek()):
                if following == ";":
                    reader.at += 1
                if (yield from reader.peek()) == "":
                    return
                yield from reader.call(names, _KEYS)
                behind = reader.at
        except FalseStartError:
            reader.at = behind

    def _calls(self, several: bool) -> str:
        return f"start: {self._group(several)}"

    def _text_or_calls(self, several: bool) -> str:
        group = self._group(several)
        start = f"start: {group} | text ({self._mark(TAG)} {group})?\ntext: TEXT"
        return rf"""{start}
TEXT: /(.|\n)*/ & ~/\{{"name"(.|\n)*/"""

    def _group(self, several: bool) -> str:
        return repeated("call", "; ", several)

    def _call(self, name: str, arguments: str) -> str:
        beginning = literal(f'{{"name": "{name}", "parameters": ')
        return f"{beginning} {arguments} {literal('}')}"
