"""JSON schemas that only endless texts fit: those that refer to themselves and never need not."""

import json
import re
from collections.abc import Iterator
from typing import Any

from runtime.messages import Constraint

Schema = Any

_LARK = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|(?P<json>%json\s*(?=\{))')
"""What can hold a schema's mark without meaning it: strings, comments, expressions; and the mark before an object."""


def documents(constraint: Constraint) -> Iterator[Schema]:
    """The JSON schemas in `constraint`, which llguidance takes."""
    match constraint.kind:
        case "json_schema":
            yield json.loads(constraint.source)
        case "lark":
            end = 0
            while (found := _LARK.search(constraint.source, end)) is not None:
                end = found.end()
                if found["json"] is not None:
                    document, end = json.JSONDecoder().raw_decode(constraint.source, end)
                    yield document


def endless(document: Schema) -> bool:
    """Whether nothing that ends fits `document`, as far as its references, required properties and least numbers of items tell.

    The references that can come to an end are found beginning with those that need no other one. `document` is a schema that
    llguidance takes: its references are into itself.
    """
    targets: dict[str, Schema] = {}
    _collect(document, document, targets)
    ending: set[str] = set()
    while more := {ref for ref, target in targets.items() if ref not in ending and _ends(target, ending)}:
        ending |= more
    return not _ends(document, ending)


def _collect(part: Schema, document: Schema, targets: dict[str, Schema]) -> None:
    """Put into `targets` what the references in `part` refer to."""
    if isinstance(part, list):
        for item in part:
            _collect(item, document, targets)
    elif isinstance(part, dict):
        ref = part.get("$ref")
        if isinstance(ref, str) and ref not in targets:
            targets[ref] = _resolve(ref, document)
        for item in part.values():
            _collect(item, document, targets)


def _resolve(ref: str, document: Schema) -> Schema:
    """What `ref` refers to; True, which anything fits, where that cannot be told."""
    found = document
    for step in ref.removeprefix("#").split("/")[1:] if ref.startswith("#") else [None]:
        name = step and step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or name not in found:
            return True
        found = found[name]
    return found


def _ends(schema: Schema, ending: set[str]) -> bool:
    """Whether something that ends fits `schema`, if it is so for the references in `ending`."""
    if not isinstance(schema, dict) or "enum" in schema or "const" in schema:
        return True
    needed = [ending.__contains__(ref)] if isinstance(ref := schema.get("$ref"), str) else []
    for name in ("anyOf", "oneOf"):
        if isinstance(alternatives := schema.get(name), list) and alternatives:
            needed.append(any(_ends(alternative, ending) for alternative in alternatives))
    needed += [_ends(part, ending) for part in _inside(schema)]
    return all(needed)


def _inside(schema: dict[str, Any]) -> list[Schema]:
    """What a value that fits `schema` always has inside, and what it fits as well."""
    parts = list(schema.get("allOf") or [])
    properties, least = schema.get("properties") or {}, schema.get("minItems") or 0
    if schema.get("type") in ("object", ["object"]):
        parts += [properties[name] for name in schema.get("required") or [] if name in properties]
    if schema.get("type") in ("array", ["array"]) and least:
        first = schema.get("prefixItems") or []
        parts += first[: int(least)]
        if len(first) < least:
            parts.append(schema.get("items", True))
    return parts
