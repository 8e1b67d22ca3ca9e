"""What answers must be, as clients say it: made into constraints, and compiled once so that what cannot be is refused."""

import asyncio
import json
from typing import Any

import msgspec

from runtime.messages import Constraint
from server.errors import bad_request


def json_object() -> Constraint:
    """Any JSON object."""
    return Constraint("json_schema", '{"type": "object"}')


def json_schema(schema: Any, *, of: str) -> Constraint:
    """What a schema allows; `of` is the body's field."""
    # llguidance has no place for its options in the schema `true`, which allows the same.
    return Constraint("json_schema", msgspec.json.encode({} if schema is True else schema).decode())


def regex(pattern: str, *, of: str) -> Constraint:
    """What a regular expression matches as a whole."""
    return Constraint("regex", pattern)


def choice(options: list[str], *, of: str) -> Constraint:
    """One of these texts. Raises ApiError 400 where there is none."""
    if not all(options) or not options:
        raise bad_request(f"The value of {of!r} needs at least one text, and none that is empty.", of)
    return lark("start: " + " | ".join(json.dumps(option, ensure_ascii=False) for option in options), of=of)


def lark(grammar: str, *, of: str) -> Constraint:
    """What a grammar in llguidance's Lark derives."""
    return Constraint("lark", grammar)


async def check(constraint: Constraint, tokenizer: object, *, of: str) -> None:
    """Raise ApiError 400 where the constraint cannot be compiled."""
    reason = await asyncio.to_thread(_flaw, constraint)
    if reason:
        raise bad_request(f"The value of {of!r} cannot be kept to: {reason}.", of)


def _flaw(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    if constraint.kind == "lark":
        return ""
    make = LLMatcher.grammar_from_regex if constraint.kind == "regex" else LLMatcher.grammar_from_json_schema
    failed, messages = LLMatcher.validate_grammar_with_warnings(make(constraint.source))
    return "; ".join(messages) if failed else ""
