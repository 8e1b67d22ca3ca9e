"""Mistral: a list of calls behind `[TOOL_CALLS]` or, from tokenizer version 11 on, the token, a name and its arguments."""

from collections.abc import Collection, Sequence

from server.tools.calls import Call
from server.tools.format import Format, listed, literal
from server.tools.reading import FalseStartError, Reader, Steps

CALLS, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


class Mistral(Format):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}` as often as there are calls.

    Both are read; a model whose tokenizer has `[ARGS]` writes the second.
    """

    special = frozenset({CALLS, ID, ARGUMENTS})
    opening = CALLS

    def render(self, calls: Sequence[Call]) -> str:
        """See `Format`."""
        if self._newer:
            return "".join(f"{CALLS}{call.name}{ARGUMENTS}{call.arguments}" for call in calls)
        written = ", ".join(f'{{"name": "{call.name}", "arguments": {call.arguments}}}' for call in calls)
        return f"{CALLS}[{written}]"

    @property
    def _newer(self) -> bool:
        return self._token_id(ARGUMENTS) is not None

    def _script(self, reader: Reader, names: Collection[str] | None) -> Steps:
        while mark := (yield from reader.content_to(CALLS)):
            try:
                following = yield from reader.peek()
                if following == "[":
                    yield from reader.calls_in_list()
                elif following == "{":
                    yield from reader.call()
                else:
                    yield from self._named(reader)
            except FalseStartError:
                reader.give_back(mark)

    def _named(self, reader: Reader) -> Steps:
        name = yield from reader.word("_-.")
        if not name:
            raise FalseStartError
        if (yield from reader.literal(ID)):
            yield from reader.word("_-")
        yield from reader.literal(ARGUMENTS)
        if (yield from reader.peek()) != "{":
            raise FalseStartError
        yield from reader.arguments(name)

    @property
    def _between(self) -> str | None:
        return "" if self._newer else None

    def _group(self, several: bool) -> str:
        return "call" if self._newer else listed(several)

    def _call(self, name: str, arguments: str) -> str:
        if self._newer:
            return f"{literal(name)} {self._mark(ARGUMENTS)} {arguments}"
        beginning = literal(f'{{"name": "{name}", "arguments": ')
        return f"{beginning} {arguments} {literal('}')}"
