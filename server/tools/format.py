"""What every way of writing calls has: how a model is told of tools, how it writes its calls, how they are read again."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, ClassVar

from server.closing import closed
from server.tools.calls import Call, ConversationError, Tool
from server.tools.reading import Parser, Reader, Steps

TokenId = Callable[[str], int | None]
"""The id of a special token by its text, or None where the model's tokenizer has no such special token."""

MOST_CALLS = 32
"""Of an answer that has to be of calls; a small model might otherwise go on calling for as long as it may."""
_TEXT = r"TEXT: /(.|\n)*/"

_COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""How arguments are spaced where the answer is constrained. With any whitespace allowed, a small model may write nothing else
for the rest of its answer."""


class Format(ABC):
    """One way of writing calls, for one model."""

    special: ClassVar[frozenset[str]]
    """The special tokens that the answer's text must show for its calls to be found."""
    single: ClassVar[bool] = False
    """Chat templates of this kind take one call a turn."""
    opening: ClassVar[str]
    """The mark before a call, or before a list of them."""
    native: bool
    """The model was made for it; False where it has to be told how."""

    def __init__(self, token_id: TokenId, native: bool) -> None:
        self.native = native
        self._token_id = token_id

    def parser(self, names: Collection[str] | None = None) -> Parser:
        """Reads one answer. `names` are those of the tools: they tell a call from JSON where the format does not mark one."""
        return Parser(partial(self._script, names=names))

    def grammar(self, tools: Sequence[Tool], *, required: bool = True, name: str | None = None, parallel: bool = True) -> str:
        """Lark for llguidance: the answer is one call or, with `parallel`, up to `MOST_CALLS`; of `name` alone, if given.

        A model that was not made for tools writes one: it has not learned when to stop calling, and few stop by themselves.
        Without `required` the answer is any text, and what in it begins as a call has to be a whole and valid one. Raises
        ValueError where `tools` has none of that name, and ConversationError where a schema is nested too deeply.
        """
        wanted = [tool for tool in tools if name in (None, tool.name)]
        if not wanted:
            raise ValueError(f"there is no tool {name!r}" if name else "there are no tools")
        several = parallel and name is None and (self.native or not required)
        lines = [self._calls(several) if required or name is not None else self._text_or_calls(several)]
        lines.append(f"call: {' | '.join(f'call_{index}' for index in range(len(wanted)))}")
        for index, tool in enumerate(wanted):
            lines.append(f"call_{index}: {self._call(tool.name, f'arguments_{index}')}")
            lines.append(f"arguments_{index}: {_arguments(tool)}")
        return "\n".join(lines) + "\n"

    def describe(self, tools: Sequence[Tool]) -> str:
        """What a model is told that does not know tools: which there are, and how to call one. Raises ConversationError."""
        listed = "\n".join(described(tool) for tool in tools)
        example = self.render([Call("<function-name>", "<arguments-as-object>")])
        return (
            "You may call functions to help with the user's request. These are the functions, with JSON schemas of their "
            f"parameters:\n<tools>\n{listed}\n</tools>\n"
            "To call a function, answer with its name and its arguments as JSON, and nothing else:\n"
            f"{example}\n"
            "Its result is then given to you. Answer in plain text where no function helps."
        )

    @abstractmethod
    def render(self, calls: Sequence[Call]) -> str:
        """`calls` as the model writes them."""

    def render_result(self, name: str | None, content: str) -> str:
        """A call's result, for a chat template that knows no results: as JSON where it is JSON, not nested too deeply."""
        try:
            return _response(name, json.loads(content))
        except (ValueError, RecursionError):
            return _response(name, content)

    @abstractmethod
    def _script(self, reader: Reader, names: Collection[str] | None) -> Steps:
        """See `reading`."""

    @property
    def _between(self) -> str | None:
        """What stands between two groups that each have an opening mark; None where all calls are in one."""
        return None

    def _calls(self, several: bool) -> str:
        """The Lark of an answer that is of calls, with its rule `start`."""
        return f"start: {repeated(f'{self._mark(self.opening)} {self._group(several)}', self._between, several)}"

    def _text_or_calls(self, several: bool) -> str:
        """The Lark of an answer that may be of calls."""
        group = self._group(several)
        if (mark := self._token_id(self.opening)) is not None:
            start = f"text (<[{mark}]> {group} text)*" if several else f"text (<[{mark}]> {group})?"
            return f"start: {start}\ntext: TEXT\n{_TEXT}"
        # A lazy lexeme ends where the mark is complete: no text goes on over one.
        start = f"(marked {group})* text" if several else f"text | marked {group}"
        return f"start: {start}\nmarked[lazy]: TEXT {literal(self.opening)}\ntext: TEXT\n{_TEXT}"

    @abstractmethod
    def _group(self, several: bool) -> str:
        """The Lark of what stands behind the opening mark, of the rule `call`."""

    @abstractmethod
    def _call(self, name: str, arguments: str) -> str:
        """The Lark of a call, of the rule `arguments`."""

    def _mark(self, token: str) -> str:
        """The Lark of a mark: the special token, or its text where the model has no such token."""
        id = self._token_id(token)
        return literal(token) if id is None else f"<[{id}]>"


def described(tool: Tool) -> str:
    """The tool as OpenAI writes it, as text. Raises ConversationError."""
    try:
        return json.dumps(tool.described, ensure_ascii=False)
    except RecursionError:
        raise _too_deep(tool) from None


def _response(name: str | None, result: Any) -> str:
    body = {"content": result} if name is None else {"name": name, "content": result}
    return f"<tool_response>\n{json.dumps(body, ensure_ascii=False)}\n</tool_response>"


def _too_deep(tool: Tool) -> ConversationError:
    return ConversationError(f"the parameters of the tool {tool.name!r} are nested too deeply")


def literal(text: str) -> str:
    """The Lark of a text."""
    return json.dumps(text, ensure_ascii=False)


def listed(several: bool) -> str:
    """The Lark of a JSON list of calls."""
    return f'"[" {repeated("call", ", ", several)} "]"'


def repeated(item: str, between: str | None, several: bool) -> str:
    """The Lark of one `item`, or of several with `between` them."""
    if not several or between is None:
        return item
    more = f"{literal(between)} {item}" if between else item
    return f"{item} ({more}){{0,{MOST_CALLS - 1}}}"


def _arguments(tool: Tool) -> str:
    """The Lark of a tool's arguments."""
    if tool.parameters is None:
        return literal("{}")
    # Its own document, so that references into it hold.
    try:
        schema = closed(tool.parameters | {"type": "object"}) | {"x-guidance": _COMPACT | {"lenient": not tool.strict}}
        return f"%json {json.dumps(schema)}"
    except RecursionError:
        raise _too_deep(tool) from None
