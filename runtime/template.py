"""A conversation becomes a prompt: the bundle's chat template, run in a sandbox.

The environment is the one that transformers gives to chat templates (`apply_chat_template` of version 5): the names, filters
and tags below and no others. A template is code from a model's author, and messages are data from anybody; the sandbox keeps
both from Python's internals, and a bound on the output keeps a loop from filling the memory. Time is not bounded.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils


class TemplateError(Exception):
    """A conversation cannot be rendered; the message is a sentence for the client."""


class ChatTemplate:
    """One compiled chat template."""

    def __init__(self, source: str, *, most: int, **tokens: str) -> None:
        """Compile `source`; `most` bounds the characters of one rendering.

        `tokens` are the special tokens that the template may name, e.g. `bos_token="<s>"`. Raises jinja2.TemplateSyntaxError.
        """
        self._template = _environment().from_string(source, globals=tokens)
        self._most = most

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt's text, special tokens spelled out; raises TemplateError."""
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt
            ):
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
