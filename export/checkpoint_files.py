"""What lies in a checkpoint's folder, read before a library loads any of it.

Libraries take what they find: weights through a link that leads elsewhere, codes for numbers, an adapter for a model. Here the
files are looked at first, headers and JSON only, and what cannot be loaded as it is meant is refused with a sentence that says
what to do.
"""

import codecs
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export import paths
from export.errors import ExportError

CONFIG = "config.json"
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header at most; the library's own limit."""
MAX_JSON = 64 << 20
"""Bytes of a JSON file that is read here at most, tokenizers and indices of weights included."""
AGAIN = "fetch or convert the model again"
"""What to do about files that are damaged, in the words that end a sentence."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of stored tensors that hold numbers as they are meant; all others are codes, or counts."""
_TEXTS = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.txt", "*.tiktoken")
"""What is read of a folder beside its weights: configuration, vocabularies, chat templates."""
_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER = 1024
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OLD_SINGLE, _OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_OTHERS = (
    ("model_index.json", "is a diffusion pipeline, which makes images; {what}"),
    ("*.onnx", "holds a model in ONNX ({name}), {compiled}"),
    ("onnx/*.onnx", "holds a model in ONNX ({name}), {compiled}"),
    ("params.json", "holds a model in its authors' own format ({name}); {converted}"),
    ("*.pth", "holds a model in its authors' own format ({name}); {converted}"),
    ("*.nemo", "holds a model in NeMo's format ({name}); {converted}"),
)
"""What a folder without config.json may be, by a file in it."""
_WORDS = {
    "what": "a language model is a folder with config.json, or a .gguf file",
    "compiled": "which is a compiled form; give the folder of the model that it was made from",
    "converted": "give the folder that was converted to Hugging Face's format, which has a config.json",
}
_ELSEWHERE = {
    "tf_model.h5": "TensorFlow",
    "tf_model.h5.index.json": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "flax_model.msgpack.index.json": "Flax",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors file declares it."""

    dtype: str
    """As the format writes it: F32, BF16, F8_E4M3, U8, ..."""
    shape: tuple[int, ...]
    file: Path
    start: int = 0
    """Its first byte, from the file's beginning; 0 where it is pickled."""
    end: int = 0


@dataclass(frozen=True)
class CheckpointFiles:
    """What is known of a folder before its weights are loaded."""

    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    """The files that are loaded, in the order in which transformers takes them."""
    tensors: dict[str, StoredTensor]
    """By name; of pickled files once `stored_types.quantization` has looked at them."""


def examine(folder: Path) -> CheckpointFiles:
    """Read the configuration and the weights' headers in `folder`.

    Raises ExportError for what no library should be let near: files outside of the folder, pointers in the place of files, an
    adapter, another framework's weights, shards that are missing, and files that are cut off.
    """
    check_contained(folder)
    check_no_pointers(*(path for pattern in _TEXTS for path in sorted(folder.glob(pattern))))
    config = read_config(folder)
    _check_no_adapter(folder)
    _check_no_kernels(folder / CONFIG, config)
    weights = _weight_files(folder, config)
    check_no_pointers(*weights)
    tensors: dict[str, StoredTensor] = {}
    for path in weights:
        if path.suffix == ".safetensors":
            _add(tensors, header(path))
    return CheckpointFiles(folder, config, weights, tensors)


def _add(tensors: dict[str, StoredTensor], more: dict[str, StoredTensor]) -> None:
    """Take up another file's tensors; raises ExportError where one of them is there already, and is another."""
    for name, tensor in more.items():
        known = tensors.get(name)
        if known is not None and _bytes_of(known) != _bytes_of(tensor):
            raise ExportError(
                f"{known.file} and {tensor.file} both hold {name}, and not the same numbers; which of the two is the model's "
                f"cannot be told, {AGAIN}"
            )
    tensors.update(more)


def _bytes_of(tensor: StoredTensor) -> tuple[str, tuple[int, ...], bytes]:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return tensor.dtype, tensor.shape, file.read(tensor.end - tensor.start)


def check_contained(folder: Path) -> None:
    """Refuse a file in `folder` that is a link to somewhere else; a hub snapshot's links into its own blobs are meant."""
    paths.check_inside(folder, *(path for path in _walk(folder) if path.is_symlink()))


def check_no_pointers(*files: Path) -> None:
    """Refuse files that are git-lfs pointers: a few lines in the place of the file.

    Only what is loaded is looked at: who pulls nothing but weights has pointers in the place of images and other formats.
    """
    for path in files:
        if is_pointer(path):
            raise ExportError(
                f"{path} is a git-lfs pointer, a few lines in the place of the file; run `git lfs install` and "
                f"`git lfs pull` in {path.parent}, or fetch the model with `hf download`"
            )


def is_pointer(path: Path) -> bool:
    """Whether the file is what git checks out where git-lfs is not installed."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_POINTER:
            return False
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises ExportError where it is not there, or cannot be a model's configuration."""
    path = folder / CONFIG
    if not path.exists():
        raise ExportError(_without_config(folder))
    config = read_json(path)
    if not isinstance(config, dict):
        raise ExportError(f"{path} is not a model's configuration: it holds a {type(config).__name__}, not an object; {AGAIN}")
    if not config:
        raise ExportError(f"{path} is empty; {AGAIN}")
    if "_class_name" in config and "_diffusers_version" in config:
        raise ExportError(f"{folder} is a part of a diffusion pipeline ({config['_class_name']}); {_WORDS['what']}")
    if not isinstance(config.get("model_type"), str) and not config.get("auto_map"):
        raise ExportError(f"{path} does not say of which kind the model is (model_type); {AGAIN}")
    return config


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ExportError."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ExportError(f"{path} has {path.stat().st_size >> 20} MiB, which no file of that name needs; {AGAIN}")
        content = path.read_bytes()
        if content.startswith(codecs.BOM_UTF8):
            raise ExportError(f"{path} begins with a byte order mark, which JSON has none of; save it as UTF-8 without one")
        return json.loads(content)
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not valid JSON ({error}); {AGAIN}") from error


def header(path: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file declares. Raises ExportError where it is cut off or something else."""
    check_no_pointers(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not size:
                raise ExportError(f"{path} is empty; {AGAIN}")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ExportError(f"{path} is cut off or not a safetensors file (its header cannot be read); {AGAIN}")
            declared = json.loads(file.read(length))
        tensors, ends = {}, [0]
        for name, entry in declared.items():
            if name != "__metadata__":
                start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
                tensors[name] = StoredTensor(str(entry["dtype"]), tuple(map(int, entry["shape"])), path, start, end)
                ends.append(end - 8 - length)
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise ExportError(f"{path} is damaged: its header is not a safetensors header; {AGAIN}") from error
    if max(ends) != size - 8 - length:
        raise ExportError(f"{path} is cut off: it has {size} bytes where its header declares {max(ends) + 8 + length}; {AGAIN}")
    return tensors


def _walk(folder: Path) -> Iterator[Path]:
    """Files and links under `folder`, but for hidden folders (.git, .cache), which nothing is loaded from."""
    for place, folders, files in os.walk(folder, onerror=_unreadable):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*files, *links):
            yield Path(place) / name


def _unreadable(error: OSError) -> None:
    raise ExportError(f"{error.filename} cannot be read: {error.strerror}") from error


def _check_no_adapter(folder: Path) -> None:
    path = folder / "adapter_config.json"
    if not path.exists():
        return
    content = read_json(path)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    left = " (if it was merged already, delete adapter_config.json)" if any(folder.glob("model*.safetensors")) else ""
    raise ExportError(f"{folder} holds an adapter (LoRA) for {base or 'another model'}, not a model; {_merge(base)}{left}")


def _check_no_kernels(path: Path, config: dict[str, Any]) -> None:
    """Refuse a configuration that names code on the hub to compute with, which transformers would fetch and run."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_no_kernels(path, value)
        elif key.endswith(("attn_implementation", "experts_implementation")) and isinstance(value, str) and "/" in value:
            raise ExportError(f"{path} has {key} {value!r}: code on the hub, which would be fetched and run; delete that entry")


def _merge(base: object) -> str:
    return (
        f"merge it into {base or 'its base model'} first (peft: `PeftModel.from_pretrained(base, adapter).merge_and_unload()"
        ".save_pretrained(folder)`) and export that folder"
    )


def _without_config(folder: Path) -> str:
    """What to say of a folder that has no config.json."""
    if (folder / "adapter_config.json").exists():
        try:
            _check_no_adapter(folder)
        except ExportError as error:
            return str(error)
    for pattern, said in _OTHERS:
        for found in sorted(folder.glob(pattern))[:1]:
            return f"{folder} {said.format(name=found.name, **_WORDS)}"
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if below:
        return f"{folder} has no {CONFIG}, but {_listed(below)} in it does; name that folder"
    if not any(folder.iterdir()):
        return f"{folder} is empty; a model is a folder with {CONFIG} and weights, or a .gguf file"
    return f"{folder} has no {CONFIG} and no GGUF file; a model is a folder with {CONFIG} and weights, or a .gguf file"


def weight_names(folder: Path, config: dict[str, Any], has: Callable[[str], bool]) -> tuple[list[str], str]:
    """The names of the files of weights that transformers loads, and that of the file that tells them.

    `has` says whether the model has a file; what tells of others must be in `folder`. Raises ExportError.
    """
    named = config.get("transformers_weights")
    if isinstance(named, str):
        return (_shards(folder, named), named) if named.endswith(".index.json") else ([named], CONFIG)
    for single, index in ((_SINGLE, _INDEX), (_OLD_SINGLE, _OLD_INDEX)):
        if has(single):
            return [single], CONFIG
        if has(index):
            return _shards(folder, index), index
    return [], CONFIG


def _weight_files(folder: Path, config: dict[str, Any]) -> tuple[Path, ...]:
    """The files of weights that transformers loads."""
    if any(_DISTRIBUTED.fullmatch(path.name) for path in folder.glob("shard-*.safetensors")):
        raise ExportError(
            f"{folder} holds a distributed checkpoint, written by a training run; save the model with save_pretrained"
        )
    names, told = weight_names(folder, config, lambda name: (folder / name).exists())
    if not names:
        raise ExportError(_without_weights(folder))
    return tuple(_inside(folder, name, told) for name in names)


def _shards(folder: Path, index: str) -> list[str]:
    """The names of the files that an index names."""
    content = read_json(_inside(folder, index, CONFIG))
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise ExportError(f"{folder / index} does not say which file holds which weight (weight_map); {AGAIN}")
    if not isinstance(content.get("metadata"), dict):
        raise ExportError(f'{folder / index} has no "metadata", which transformers wants there, if only as {{}}; {AGAIN}')
    return sorted(set(weights.values()))


def _inside(folder: Path, name: str, told: str) -> Path:
    """The file `name` of `folder`, as `told` has it; refused where it is not there or lies elsewhere."""
    path = folder / name
    try:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ExportError(f"{folder / told} names weights outside of the model's folder ({name}); {AGAIN}")
        if path.is_file():
            paths.check_inside(folder, path)
            return path
    except (OSError, ValueError):  # a name that no file can have
        pass
    raise ExportError(f"{folder} lacks {name[:80]}, which its {told} names; the download is not complete, {AGAIN}")


def _without_weights(folder: Path) -> str:
    for name, framework in _ELSEWHERE.items():
        if (folder / name).exists():
            return (
                f"{folder} has weights for {framework} only ({name}), which transformers does not load any more; take a "
                "version with safetensors, or convert it with an older transformers"
            )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return f"{folder} has no {_SINGLE}, but {_listed(ggufs)}; name that file to export it"
    if any(folder.glob("onnx/*.onnx")) or any(folder.glob("*.onnx")):
        return f"{folder} holds a model in ONNX, {_WORDS['compiled']}"
    others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if others:
        return f"{folder} has no {_SINGLE} and no {_INDEX}; it has {_listed(others)}, which transformers would not look at"
    return f"{folder} has a {CONFIG} but no weights ({_SINGLE}, {_INDEX}, {_OLD_SINGLE}); {AGAIN}"


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
