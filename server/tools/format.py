"""What every way of writing calls has: how a model is told of tools, how it writes its calls, how they are read again."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, ClassVar

from server.tools.calls import Call, Tool
from server.tools.reading import Parser, Reader, Steps

TokenId = Callable[[str], int | None]
"""The id of a special token by its text, or None where the model's tokenizer has no such special token."""

_OPENING = frozenset(
    ("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties", "dependentSchemas")
) | frozenset(("allOf", "anyOf", "oneOf", "if", "$ref", "$dynamicRef"))
"""Keywords of a schema for an object that may have or need more properties than those under `properties`."""
MOST_CALLS = 8
"""Calls that an answer may have where one is required. A small model that has once begun may repeat its call for ever."""
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""How arguments are spaced where the answer is constrained. With any whitespace allowed, a small model may write nothing else
for the rest of its answer."""


class Format(ABC):
    """One way of writing calls, for one model."""

    special: ClassVar[frozenset[str]]
    """The special tokens that the answer's text must show for its calls to be found."""
    single: ClassVar[bool] = False
    """Chat templates of this kind take one call a turn."""
    native: bool
    """The model was made for it; False where it has to be told how."""

    def __init__(self, token_id: TokenId, native: bool) -> None:
        self.native = native
        self._token_id = token_id

    def parser(self, names: Collection[str] | None = None) -> Parser:
        """Reads one answer. `names` are those of the tools: they tell a call from JSON where the format does not mark one."""
        return Parser(partial(self._script, names=names))

    def grammar(self, tools: Sequence[Tool], *, name: str | None = None, parallel: bool = True) -> str:
        """Lark for llguidance: the answer is one call or, with `parallel`, up to `MOST_CALLS`; of `name` alone, if given.

        Raises ValueError where `tools` has none of that name.
        """
        wanted = [tool for tool in tools if name in (None, tool.name)]
        if not wanted:
            raise ValueError(f"there is no tool {name!r}" if name else "there are no tools")
        lines = [
            f"start: {self._answer('call', MOST_CALLS if parallel and name is None else 1)}",
            f"call: {' | '.join(f'call_{index}' for index in range(len(wanted)))}",
        ]
        for index, tool in enumerate(wanted):
            lines.append(f"call_{index}: {self._call(tool.name, f'arguments_{index}')}")
            lines.append(f"arguments_{index}: {_arguments(tool)}")
        return "\n".join(lines) + "\n"

    def describe(self, tools: Sequence[Tool]) -> str:
        """What a model is told that does not know tools: which there are, and how to call one."""
        listed = "\n".join(json.dumps(tool.described, ensure_ascii=False) for tool in tools)
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
        """A call's result, for a chat template that knows no results."""
        try:
            result: Any = json.loads(content)
        except ValueError:
            result = content
        body = {"content": result} if name is None else {"name": name, "content": result}
        return f"<tool_response>\n{json.dumps(body, ensure_ascii=False)}\n</tool_response>"

    @abstractmethod
    def _script(self, reader: Reader, names: Collection[str] | None) -> Steps:
        """See `reading`."""

    @abstractmethod
    def _answer(self, call: str, most: int) -> str:
        """The Lark of an answer of up to `most` calls, of the rule `call`."""

    @abstractmethod
    def _call(self, name: str, arguments: str) -> str:
        """The Lark of a call, of the rule `arguments`."""

    def _mark(self, token: str) -> str:
        """The Lark of a mark: the special token, or its text where the model has no such token."""
        id = self._token_id(token)
        return literal(token) if id is None else f"<[{id}]>"


def literal(text: str) -> str:
    """The Lark of a text."""
    return json.dumps(text, ensure_ascii=False)


def _arguments(tool: Tool) -> str:
    """The Lark of a tool's arguments."""
    if tool.parameters is None:
        return literal("{}")
    # Its own document, so that references into it hold.
    schema = tool.parameters | {"type": "object", "x-guidance": _COMPACT | {"lenient": not tool.strict}}
    properties, required = schema.get("properties"), schema.get("required", [])
    closed = isinstance(properties, dict) and isinstance(required, list) and not _OPENING & schema.keys()
    if closed and properties and all(isinstance(name, str) and name in properties for name in required):
        # Nobody means arguments that the tool does not have; a model that may invent names does.
        schema["additionalProperties"] = False
    return f"%json {json.dumps(schema)}"
