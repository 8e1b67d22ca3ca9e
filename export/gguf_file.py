"""A GGUF on disk: the files it is split into, its metadata and its tensors."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor

from export import gguf_parts
from export.errors import ExportError

Value = bool | int | float | str | list[bool | int | float | str]
"""What a metadata key holds."""

TEXT = "tokenizer."
"""Begins the keys that say how text becomes tokens."""
_TOKENS = f"{TEXT}ggml.tokens"

_read_last: tuple[object, Mapping[str, Value]] | None = None
"""What `keys` gave, and of which file: a large vocabulary takes seconds to read, and the model, its text and its sampling each
come with a path."""


@dataclass(frozen=True)
class GgufFile:
    """A GGUF that was opened, with all of its parts; tensors are read when they are asked for."""

    path: Path
    """The only file, or the first part."""
    readers: tuple[GGUFReader, ...]
    keys: Mapping[str, Value]
    """All of the first part's."""

    @cached_property
    def metadata(self) -> Mapping[str, Value]:
        """The keys, without the tokenizer's."""
        return {key: value for key, value in self.keys.items() if not key.startswith(TEXT)}

    @property
    def architecture(self) -> str:
        """The name in `general.architecture`."""
        return str(self.metadata["general.architecture"])

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of the tensors of all parts."""
        return tuple(tensor.name for reader in self.readers for tensor in reader.tensors)

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the tokenizer has; None where the file holds no tokenizer."""
        return len(self._tokens) or None

    def token_id(self, name: str) -> int | None:
        """The id under `tokenizer.ggml.NAME_token_id`; raises ExportError where that is none."""
        return token_id(self.keys, name, self.path)

    @property
    def _tokens(self) -> list[bool | int | float | str]:
        said = self.keys.get(_TOKENS)
        return said if isinstance(said, list) else []

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor's name and values in float32, with the first dimension the slowest. Raises ExportError."""
        for reader in self.readers:
            for stored in reader.tensors:
                yield stored.name, self._values(stored)

    def tensor(self, name: str) -> torch.Tensor | None:
        """The values of one tensor, in float32; None where the file has none of that name."""
        found = [stored for reader in self.readers for stored in reader.tensors if stored.name == name]
        return self._values(found[0]) if found else None

    def _values(self, stored: ReaderTensor) -> torch.Tensor:
        try:
            values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise ExportError(
                f"{self.path} stores {stored.name} as {stored.tensor_type.name}, which the gguf package cannot read;"
                " take another quantization of the model"
            ) from None
        return torch.from_numpy(np.array(values, np.float32))


def read(path: Path) -> GgufFile:
    """Open the GGUF that `path` is, or is a part of. Raises ExportError."""
    files = gguf_parts.found(path)
    readers = tuple(_open(file) for file in files)
    _check_parts(files, readers)
    return GgufFile(files[0], readers, _keys(files[0], readers[0]))


def keys(path: Path) -> Mapping[str, Value]:
    """The metadata of the GGUF that `path` is, or is a part of: all of its first part's keys. Raises ExportError."""
    first = gguf_parts.found(path)[0]
    if _read_last is not None and _read_last[0] == _state(first):
        return _read_last[1]
    return _keys(first, _open(first))


def token_id(keys: Mapping[str, Value], name: str, where: Path) -> int | None:
    """The id under `tokenizer.ggml.NAME_token_id` of the file `where`, None where it says none; raises ExportError."""
    said = keys.get(f"{TEXT}ggml.{name}_token_id")
    if said is not None and type(said) is not int:
        raise ExportError(f"{where} names {said!r} as its {name}, which is not a token's id; convert the model again")
    tokens = keys.get(_TOKENS)
    count = len(tokens) if isinstance(tokens, list) else 0
    if said is not None and count and not 0 <= said < count:
        raise ExportError(f"{where} names token {said} as its {name}, of {count} tokens; convert the model again")
    return said


def _keys(path: Path, reader: GGUFReader) -> Mapping[str, Value]:
    global _read_last
    try:
        found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except ValueError as error:  # text that is not UTF-8
        raise _unreadable(path, str(error)) from error
    if "general.architecture" not in found:
        raise _unreadable(path, "its metadata has no general.architecture")
    _read_last = (_state(path), found)
    return found


def _state(path: Path) -> object:
    """What changes when the file does."""
    stat = path.stat()
    return path.absolute(), stat.st_ino, stat.st_size, stat.st_mtime_ns


def _open(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except Exception as error:  # the reader raises whatever its arrays did
        raise _unreadable(path, str(error).strip() or type(error).__name__) from error


def _unreadable(path: Path, why: str) -> ExportError:
    return ExportError(
        f"{path} could not be loaded: {why.splitlines()[0]}; it is cut off or not a GGUF: fetch it again, or export the "
        "original model's folder"
    )


def _check_parts(files: tuple[Path, ...], readers: tuple[GGUFReader, ...]) -> None:
    """Refuse parts that do not belong together, and a set that is short of tensors or has one twice."""

    def number(reader: GGUFReader, key: str, default: int) -> int:
        field = reader.fields.get(f"split.{key}")
        return default if field is None else int(field.contents())

    for position, (file, reader) in enumerate(zip(files, readers, strict=True)):
        count, place = number(reader, "count", 1), number(reader, "no", 0)
        if (max(count, 1), place) != (len(files), position):
            raise ExportError(
                f"{file} says that it is part {place + 1} of {max(count, 1)}, its name that it is part {position + 1} of"
                f" {len(files)}; give the parts the names that they were published under"
            )
    told = number(readers[0], "tensors.count", 0)
    held = [tensor.name for reader in readers for tensor in reader.tensors]
    if len(files) > 1 and told and told != len(held):
        raise ExportError(f"the {len(files)} parts of {files[0]} hold {len(held)} tensors, not {told}; fetch them all again")
    if twice := [name for name, times in Counter(held).items() if times > 1]:
        raise ExportError(
            f"the parts of {files[0]} hold {twice[0]} more than once, and which one counts is not said; fetch them all again, "
            "or convert the model again"
        )
