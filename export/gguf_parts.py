"""The files of a GGUF that is split: `NAME-00001-of-00003.gguf` and its like, as llama.cpp's `llama-gguf-split` names them."""

import re
from pathlib import Path

from export.errors import ExportError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def names(name: str) -> tuple[str, ...]:
    """The names of all files of the GGUF that `name` is one of, in order; the name itself where it is not split."""
    split = _PART.fullmatch(name)
    if split is None:
        return (name,)
    count = int(split["count"])
    return tuple(f"{split['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)) or (name,)


def stem(name: str) -> str:
    """The name of a file without its suffix, a GGUF's without the number of its part."""
    split = _PART.fullmatch(name)
    return split["stem"] if split is not None else Path(name).stem


def found(path: Path) -> tuple[Path, ...]:
    """All files of the GGUF that `path` is one of, the first in front. Raises ExportError where one is not there."""
    files = tuple(path.with_name(name) for name in names(path.name))
    if lost := [file.name for file in files if not file.is_file()]:
        raise ExportError(
            f"{path.parent} lacks {len(lost)} of the {len(files)} parts of {stem(path.name)} ({', '.join(lost)});"
            " fetch them too, into the same folder"
        )
    return files
