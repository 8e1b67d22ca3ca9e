"""A GGUF on disk: the files it is split into, its metadata and its tensors."""

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

_TEXT = "tokenizer."
"""Begins the keys that export/tokenizer.py reads; they hold whole vocabularies, and are skipped here."""


@dataclass(frozen=True)
class GgufFile:
    """A GGUF that was opened, with all of its parts; tensors are read when they are asked for."""

    path: Path
    """The only file, or the first part."""
    readers: tuple[GGUFReader, ...]

    @cached_property
    def metadata(self) -> Mapping[str, Value]:
        """The keys of the first part, without the tokenizer's."""
        fields = self.readers[0].fields
        return {key: field.contents() for key, field in fields.items() if not key.startswith(("GGUF.", _TEXT))}

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
        field = self.readers[0].fields.get("tokenizer.ggml.tokens")
        return None if field is None else len(field.data)

    def tokens(self, *texts: str) -> list[int]:
        """The ids of those tokens of the vocabulary that are exactly one of `texts`."""
        field = self.readers[0].fields.get("tokenizer.ggml.tokens")
        return [] if field is None else [id for id, text in enumerate(field.contents()) if text in texts]

    def token_id(self, name: str) -> int | None:
        """The id under `tokenizer.ggml.NAME_token_id`."""
        field = self.readers[0].fields.get(f"tokenizer.ggml.{name}_token_id")
        return None if field is None else int(field.contents())

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
    opened = GgufFile(files[0], tuple(_open(file) for file in files))
    _check_parts(files, opened.readers)
    if "general.architecture" not in opened.metadata:
        raise _unreadable(files[0], "its metadata has no general.architecture")
    return opened


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
    """Refuse parts that do not belong together, and a set that is short of tensors."""

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
    held = sum(len(reader.tensors) for reader in readers)
    if len(files) > 1 and told and told != held:
        raise ExportError(f"the {len(files)} parts of {files[0]} hold {held} tensors, not {told}; fetch them all again")
