"""A conversation becomes a prompt: the bundle's chat template, run in a sandbox.

The environment is the one that transformers gives to chat templates (`apply_chat_template` of version 5): the names, filters
and tags below and no others. A template is code from a model's author, and messages are data from anybody; the sandbox keeps
both from Python's internals, and a bound on the output keeps a loop from filling the memory. Time is not bounded.
"""

import datetime
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils


class TemplateError(Exception):
    """A conversation cannot be rendered; the message is a sentence for the client."""


@dataclass(frozen=True)
class Shape:
    """What a chat template takes, as far as it can be read from its text."""

    tools: Literal["variable", "system message"] | None = None
    """Where it looks for the tools: in the variable of that name, or in the system message's field of that name, as text."""
    calls: bool = False
    """It writes the `tool_calls` of a message."""
    results: bool = False
    """It writes messages of role "tool"."""
    system: bool = True
    """It writes a system message."""
    parts: bool = False
    """It wants a message's content as a list of parts; else as a string."""
    arguments: Literal["object", "text"] = "object"
    """How it wants the arguments of a call."""


class ChatTemplate:
    """One compiled chat template."""

    def __init__(self, source: str, *, most: int, tokens: Mapping[str, str] | None = None) -> None:
        """Compile `source`; `most` bounds the characters of one rendering.

        `tokens` are the special tokens that the template may name, e.g. `{"bos_token": "<s>"}`. Raises
        jinja2.TemplateSyntaxError, also where the template is nested too deeply for jinja2 or for Python.
        """
        environment = _environment()
        try:
            self._template = environment.from_string(source, globals=dict(tokens or {}))
            self._tree = environment.parse(source)
        except jinja2.TemplateSyntaxError:
            raise
        except Exception as error:  # RecursionError, and whatever Python's own compiler raises for what jinja2 makes of it
            raise jinja2.TemplateSyntaxError(f"it cannot be compiled: {str(error) or type(error).__name__}", 1) from error
        self._most = most

    @cached_property
    def shape(self) -> Shape:
        """What the template takes."""
        read = _Reading(self._tree)
        results = read.results or self._writes("user", "assistant", "tool", parts=read.parts)
        system = self._writes("system", "user", parts=read.parts)
        return Shape(read.tools, read.calls, results, system, read.parts, read.arguments)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens spelled out; raises TemplateError.

        With `continue_final_message` the prompt ends with the last message's content, which the answer continues; no generation
        prompt is added then. `options` are further variables of the template, such as `enable_thinking`.
        """
        messages = [_without_gaps(message) for message in messages]
        variables = {
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        if taken := variables.keys() & (options or {}).keys():
            raise TemplateError(f"the template's variable {min(taken)!r} cannot be set; it is the conversation's own")
        if not continue_final_message:
            return self._render(variables | dict(options or {}))
        # The space tells whether the template trims what the mark is the end of.
        mark = secrets.token_hex(8)
        variables["messages"] = [*messages[:-1], _marked(messages, mark + " ")]
        rendered = self._render(variables | dict(options or {}))
        at = rendered.rfind(mark)
        if at < 0:
            raise TemplateError("the model's chat template leaves out the final message's text: it cannot be continued")
        return rendered[:at] if rendered.startswith(mark + " ", at) else rendered[:at].rstrip()

    def _render(self, variables: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(variables):
                length += len(piece)
                if length > self._most:
                    raise TemplateError(
                        f"the conversation renders to more than {self._most} characters, more than a prompt of this model can"
                        " hold; send less"
                    )
                pieces.append(piece)
        except TemplateError:
            raise
        except jinja2.TemplateError as error:
            raise TemplateError(f"the model's chat template refuses the conversation: {error}") from error
        except Exception as error:  # Templates run arbitrary expressions over whatever the client sent.
            what = str(error) or type(error).__name__
            raise TemplateError(f"the model's chat template cannot render the conversation: {what}") from error
        return "".join(pieces)

    def _writes(self, *roles: str, parts: bool) -> bool:
        """Whether a message of each role comes out, which is found out by trying: templates refuse one in many ways."""
        marks = [secrets.token_hex(8) for _ in roles]
        contents = [[{"type": "text", "text": mark}] if parts else mark for mark in marks]
        try:
            rendered = self.render([{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)])
        except TemplateError:
            return False
        return all(mark in rendered for mark in marks)


_REASONING = ("reasoning_content", "thinking", "reasoning")
"""The fields in which a message's reasoning is sent; templates read one of the first two."""


def _without_gaps(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without fields that are null, and its reasoning by the names that templates know, as transformers does."""
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _marked(messages: Sequence[Mapping[str, Any]], mark: str) -> Mapping[str, Any]:
    """The last message with `mark` behind its text."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    if isinstance(content, str):
        return {**last, "content": content + mark}
    parts: list[Any] = list(content or ())
    for at in reversed(range(len(parts))):
        if "text" in parts[at]:
            parts[at] = {**parts[at], "text": parts[at]["text"] + mark}
            return {**last, "content": parts}
    raise TemplateError("the final message has no text that could be continued")


_OF_OBJECTS = ("tojson", "items", "dictsort", "mapping")
"""Filters and tests whose subject is an object."""


class _Reading:
    """What a template's syntax tree tells of what the template takes."""

    def __init__(self, tree: jinja2.nodes.Template) -> None:
        self._tree = tree
        self._content_names = {"content"}
        """Variables that hold a message's content."""
        for assign in tree.find_all(jinja2.nodes.Assign):
            if isinstance(assign.target, jinja2.nodes.Name) and _field(assign.node) == "content":
                self._content_names.add(assign.target.name)

    @property
    def tools(self) -> Literal["variable", "system message"] | None:
        if any(name.name == "tools" and name.ctx == "load" for name in self._tree.find_all(jinja2.nodes.Name)):
            return "variable"
        return "system message" if "tools" in self._fields else None

    @property
    def calls(self) -> bool:
        return "tool_calls" in self._fields or "tool_calls" in self._constants

    @property
    def results(self) -> bool:
        return "tool" in self._constants

    @property
    def parts(self) -> bool:
        """It goes through a content's parts, and nowhere asks whether the content is a string."""
        loops = any(self._is_content(loop.iter) for loop in self._tree.find_all(jinja2.nodes.For))
        asks = any(test.name == "string" and self._is_content(test.node) for test in self._tree.find_all(jinja2.nodes.Test))
        return loops and not asks

    @property
    def arguments(self) -> Literal["object", "text"]:
        """Text where a call's arguments are joined to other text or written as they are, and nothing asks for an object."""
        parents = [parent for parent, node in _nested(self._tree) if _field(node) == "arguments"]
        if any(isinstance(parent, jinja2.nodes.For) or getattr(parent, "name", None) in _OF_OBJECTS for parent in parents):
            return "object"
        joined = (jinja2.nodes.Output, jinja2.nodes.Add, jinja2.nodes.Concat)
        return "text" if any(isinstance(parent, joined) for parent in parents) else "object"

    @cached_property
    def _fields(self) -> set[str]:
        nodes = self._tree.find_all((jinja2.nodes.Getattr, jinja2.nodes.Getitem))
        return {name for node in nodes if (name := _field(node)) is not None}

    @cached_property
    def _constants(self) -> set[Any]:
        return {node.value for node in self._tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}

    def _is_content(self, node: jinja2.nodes.Node | None) -> bool:
        while isinstance(node, jinja2.nodes.Filter):  # as in `content | selectattr(...)`
            node = node.node
        return _field(node) == "content" or (isinstance(node, jinja2.nodes.Name) and node.name in self._content_names)


def _field(node: jinja2.nodes.Node | None) -> str | None:
    """The name of the field that `node` looks up, as in `message.content` and `message['content']`."""
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr
    if isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Const):
        return node.arg.value if isinstance(node.arg.value, str) else None
    return None


def _nested(node: jinja2.nodes.Node) -> Iterator[tuple[jinja2.nodes.Node, jinja2.nodes.Node]]:
    """Every node below `node`, with the one that it is directly in."""
    for child in node.iter_child_nodes():
        yield node, child
        yield from _nested(child)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()`, refusing names with a leading underscore: they reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # All positional, as in jinja2, so that `namespace(self=1)` is a name like any other.
        for name in dict(*args[1:], **kwargs):
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that jinja2's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
