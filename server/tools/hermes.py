"""Nous Research's Hermes, Qwen 2.5 and 3, and many after them: each call in a `<tool_call>` element of its own."""

from collections.abc import Collection, Sequence

from server.tools.calls import Call
from server.tools.format import Format, literal
from server.tools.reading import FalseStartError, Reader, Steps

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(Format):
    """`<tool_call>`, an object with name and arguments, `</tool_call>`, each on a line."""

    special = frozenset({OPEN, CLOSE})
    opening = OPEN

    def render(self, calls: Sequence[Call]) -> str:
        """See `Format`."""
        return "\n".join(f'{OPEN}\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n{CLOSE}' for call in calls)

    def _script(self, reader: Reader, names: Collection[str] | None) -> Steps:
        while mark := (yield from reader.content_to(OPEN)):
            try:
                yield from reader.call()
            except FalseStartError:
                reader.give_back(mark)
                continue
            yield from reader.closing(CLOSE)

    @property
    def _between(self) -> str | None:
        return "\n"

    def _group(self, several: bool) -> str:
        return "call"

    def _call(self, name: str, arguments: str) -> str:
        beginning = literal(f'\n{{"name": "{name}", "arguments": ')
        return f"{beginning} {arguments} {literal('}' + chr(10))} {self._mark(CLOSE)}"
