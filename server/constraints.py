"""What a client wants its answer to keep to, as a `Constraint`.

What is built here is only well-formed; whether an answer can keep to it is told by `server.checker`.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from runtime.bundle import TOKENIZER, Bundle
from runtime.messages import Constraint
from server.closing import closed
from server.compiling import Vocabulary
from server.errors import bad_request

LONGEST = 256 << 10
"""Bytes of a schema, a regular expression or a grammar. OpenAI's limit for schemas comes to less."""


def json_object() -> Constraint:
    """Any JSON object."""
    return Constraint("json_schema", '{"type":"object"}')


def json_schema(schema: Any, *, of: str) -> Constraint:
    """JSON that `schema` describes: a dictionary or True, from the body's field `of`. Raises ApiError 400.

    Objects have no properties but those that are named, where some are; see `closing`.
    """
    if not isinstance(schema, dict) and schema is not True:
        raise bad_request(f"The value of {of!r} must be a JSON schema, which is an object.", of)
    try:
        _check_size(len(msgspec.json.encode(schema)), of)  # before it is gone through, which takes far longer
        source = msgspec.json.encode({} if schema is True else closed(schema)).decode()
    except RecursionError:
        raise bad_request(f"The JSON schema in {of!r} is nested too deeply.", of) from None
    return Constraint("json_schema", source)


def regex(pattern: str, *, of: str) -> Constraint:
    """Text that `pattern`, a regular expression of Rust's `regex`, matches as a whole, from field `of`. Raises ApiError 400."""
    return _bounded(Constraint("regex", pattern), of)


def choice(options: list[str], *, of: str) -> Constraint:
    """One of `options`, as it stands, from the field `of`. Raises ApiError 400."""
    if not options or not all(options):
        raise bad_request(f"{of!r} must name one option at least, and none that is empty.", of)
    # One terminal, not a rule: thousands of alternatives are then one automaton.
    return _bounded(Constraint("lark", "start: OPTION\nOPTION: " + " | ".join(map(json.dumps, options))), of)


def lark(grammar: str, *, of: str) -> Constraint:
    """Text of `grammar`, in llguidance's Lark, from the field `of`. Raises ApiError 400."""
    return _bounded(Constraint("lark", grammar), of)


def vocabulary(folder: Path, bundle: Bundle) -> Vocabulary:
    """What the answers of the bundle in `folder` are made of."""
    return Vocabulary(str((folder / TOKENIZER).absolute()), bundle.tokenizer or "", bundle.vocab_size, bundle.stop_ids)


def _bounded(constraint: Constraint, of: str) -> Constraint:
    try:
        size = len(constraint.source.encode())
    except UnicodeEncodeError:
        raise bad_request(f"The value of {of!r} has half of a surrogate pair; send whole characters.", of) from None
    _check_size(size, of)
    return constraint


def _check_size(size: int, of: str) -> None:
    if size > LONGEST:
        raise bad_request(f"The value of {of!r} has {size} bytes; at most {LONGEST} are taken.", of)
