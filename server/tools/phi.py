"""Phi-4-mini: a list of calls between `<|tool_call|>` and `<|/tool_call|>`, or behind `functools` where it is told so."""

from collections.abc import Collection, Sequence

from server.tools.calls import Call
from server.tools.format import Format, listed, literal
from server.tools.reading import FalseStartError, Reader, Steps

OPEN, CLOSE = "<|tool_call|>", "<|/tool_call|>"
FUNCTOOLS = "functools"


class Phi(Format):
    """`<|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>` or `functools[{...}, ...]`; both are read."""

    special = frozenset({OPEN, CLOSE})
    opening = OPEN

    def render(self, calls: Sequence[Call]) -> str:
        """See `Format`."""
        written = ", ".join(f'{{"name": "{call.name}", "arguments": {call.arguments}}}' for call in calls)
        return f"{OPEN}[{written}]{CLOSE if self._closes else ''}"

    @property
    def _closes(self) -> bool:
        """Granite, which has the first mark's token and not the second's, leaves it out."""
        return self._token_id(CLOSE) is not None or self._token_id(OPEN) is None

    def _script(self, reader: Reader, names: Collection[str] | None) -> Steps:
        while mark := (yield from reader.content_to(OPEN, FUNCTOOLS)):
            try:
                if mark == OPEN and (yield from reader.peek()) == "{":
                    yield from reader.call()
                else:
                    yield from reader.calls_in_list()
            except FalseStartError:
                reader.give_back(mark)
                continue
            if mark == OPEN:
                yield from reader.closing(CLOSE)

    def _group(self, several: bool) -> str:
        close = f" {self._mark(CLOSE)}" if self._closes else ""
        return f"{listed(several)}{close}"

    def _call(self, name: str, arguments: str) -> str:
        beginning = literal(f'{{"name": "{name}", "arguments": ')
        return f"{beginning} {arguments} {literal('}')}"
