"""Random JSON schemas of every shape that constraints know: all of them can be met, and by short answers."""

import random
import string
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_NAMES = ("name", "id", "first name", "größe", 'a"b', "c\\d", "日本", "x", "items", "$ref", "type", "e-mail", "/", "note:")
_WORDS = ("red", "green", "deep blue", "", '"quoted"', "naïve", "a\\b", "tab\t", "line\n", "🙂", "/*", "true")
_PATTERNS = (
    "^[a-z]{2,5}$",
    "^(yes|no|maybe)$",
    "^[A-Z][a-z]{0,6}[0-9]{2}$",
    "[xyz]",
    "^\\d{3}-\\d{2}$",
    "^#[0-9a-f]{6}$",
)
_FORMATS = ("date", "date-time", "uuid", "ipv4", "ipv6")
_DEEPEST = 3


def schema(seed: int) -> Schema:
    """The schema of that number, an object at the top."""
    return _Maker(random.Random(f"schema {seed}")).document()


class _Maker:
    """Draws one schema; `definitions` are what it may refer to."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.definitions: dict[str, Schema] = {}

    def document(self) -> Schema:
        if self.chance.random() < 0.5:
            self.definitions["small"] = self.leaf()
        if self.chance.random() < 0.3:
            value = self.leaf()
            self.definitions["list"] = {
                "type": "object",
                "properties": {"value": value, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}]}},
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        if self.chance.random() < 0.2:
            self.definitions["tree"] = {
                "type": "object",
                "properties": {"leaves": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}},
                "additionalProperties": False,
            }
        made = self.object(0)
        return made | {"$defs": self.definitions} if self.definitions else made

    def any(self, depth: int) -> Schema:
        """Any schema, without further ones inside where it stands at the greatest depth."""
        made: list[Callable[[], Schema]] = [self.leaf] * 4
        if self.definitions:
            made.append(self.reference)
        if depth < _DEEPEST:
            made += [lambda: self.object(depth), lambda: self.array(depth), lambda: self.either(depth)]
        return self.chance.choice(made)()

    def object(self, depth: int) -> Schema:
        names = self.chance.sample(_NAMES, self.chance.randrange(1, 5 - depth))
        made: Schema = {"type": "object", "properties": {name: self.any(depth + 1) for name in names}}
        required = [name for name in names if self.chance.random() < 0.6]
        if required:
            made["required"] = required
        made["additionalProperties"] = False
        if depth and self.chance.random() < 0.2:  # a map
            made = {"type": "object", "additionalProperties": self.leaf(), "maxProperties": self.chance.randrange(3)}
        return made

    def array(self, depth: int) -> Schema:
        least = self.chance.randrange(3)
        made: Schema = {
            "type": "array",
            "items": self.any(depth + 1),
            "minItems": least,
            "maxItems": least + self.chance.randrange(3),
        }
        if self.chance.random() < 0.2:
            first = [self.leaf() for _ in range(self.chance.randrange(1, 3))]
            made = {"type": "array", "prefixItems": first, "items": False, "minItems": len(first)}
        return made

    def either(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth + 1) for _ in range(self.chance.randrange(1, 4))]}

    def reference(self) -> Schema:
        return {"$ref": f"#/$defs/{self.chance.choice(list(self.definitions))}"}

    def leaf(self) -> Schema:
        made = self.chance.choice(
            [self.integer, self.number, self.text, self.text, self.pattern, self.enum, self.const, self.plain]
        )()
        if self.chance.random() < 0.15 and made.get("type") in ("integer", "number", "string", "boolean"):
            made["type"] = [made["type"], "null"]
        if self.chance.random() < 0.2:
            made |= {"title": "A title", "description": "What it means."}
        return made

    def integer(self) -> Schema:
        least = self.chance.randrange(-10_000, 10_000)
        most = least + self.chance.choice([0, 1, 9, 1000, 10**6])
        made: Schema = {"type": "integer", "minimum": least, "maximum": most}
        if self.chance.random() < 0.2:
            made = {"type": "integer", "exclusiveMinimum": least - 1, "exclusiveMaximum": most + 1}
        if self.chance.random() < 0.1:
            made = {"type": "integer", "minimum": 0, "maximum": 999, "multipleOf": self.chance.choice([2, 5, 7])}
        return made

    def number(self) -> Schema:
        least = round(self.chance.uniform(-100, 100), 2)
        return {"type": "number", "minimum": least, "maximum": round(least + self.chance.choice([0.5, 3.25, 1000]), 2)}

    def text(self) -> Schema:
        least = self.chance.randrange(4)
        return {"type": "string", "minLength": least, "maxLength": least + self.chance.randrange(9)}

    def pattern(self) -> Schema:
        if self.chance.random() < 0.5:
            return {"type": "string", "format": self.chance.choice(_FORMATS)}
        pattern = self.chance.choice(_PATTERNS)
        return {"type": "string", "pattern": pattern} | ({} if pattern.startswith("^") else {"maxLength": 8})

    def value(self) -> Any:
        return self.chance.choice(
            [
                *_WORDS,
                None,
                True,
                False,
                0,
                -17,
                3.25,
                1e20,
                "".join(self.chance.choices(string.printable, k=6)),
                [1, "two", None],
                {"k": [], "größe": {"deep": 1.5}},
            ]
        )

    def enum(self) -> Schema:
        return {"enum": [self.value() for _ in range(self.chance.randrange(1, 6))]}

    def const(self) -> Schema:
        return {"const": self.value()}

    def plain(self) -> Schema:
        return {"type": self.chance.choice(["boolean", "null"])}
