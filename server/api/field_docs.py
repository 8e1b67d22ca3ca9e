"""What the fields of bodies and answers mean, for the description: the texts that stand below them where they are defined."""

import ast
import inspect
import itertools
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import msgspec


def describe(types: Iterable[type[msgspec.Struct]], schemas: dict[str, dict[str, Any]]) -> None:
    """Write into `schemas`, which are those of `types` and of all that they hold, what each of their fields means."""
    for struct in _structs(types):
        names = {field.encode_name: field.name for field in msgspec.structs.fields(struct)}
        for name, schema in schemas.get(struct.__name__, {}).get("properties", {}).items():
            text = _meaning(struct, names.get(name, name))
            if text:
                schema["description"] = text


def _structs(types: Iterable[type[msgspec.Struct]]) -> set[type]:
    """These types and those of the values of their fields, at any depth."""
    found: set[type] = set()

    def visit(node: object) -> None:
        if isinstance(node, msgspec.inspect.StructType):
            if node.cls in found:
                return
            found.add(node.cls)
        if isinstance(node, tuple):
            for each in node:
                visit(each)
        elif isinstance(node, msgspec.inspect.Type | msgspec.inspect.Field):
            for name in node.__struct_fields__:
                visit(getattr(node, name))

    visit(msgspec.inspect.multi_type_info(types))
    return found


def _meaning(struct: type, name: str) -> str:
    """The text below a field in the class that defines it last; empty where there is none."""
    for class_ in struct.__mro__:
        texts = _texts(class_.__module__).get(class_.__name__, {})
        if name in texts:
            return texts[name]
    return ""


@cache
def _texts(module: str) -> dict[str, dict[str, str]]:
    """The texts below the fields of a module's classes, by class and field, each on one line."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # compiled, or built in
        return {}
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    return {node.name: dict(_below(node.body)) for node in classes}


def _below(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, text in itertools.pairwise(body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(meaning))),
            ):
                yield name, " ".join(meaning.replace("`", "").split())
