"""The authors' sampling: what a model's files say of how its tokens are to be drawn where nobody says.

That is generation_config.json beside a model's weights, or `general.sampling.*` in a GGUF's metadata. As in vLLM, only what the
file says counts: transformers' own defaults, as top-k 50, are nobody's recommendation. Unlike there, and as in OpenVINO GenAI
and transformers, `do_sample: false` means that the most likely token is taken. A value that cannot be meant is left out, with a
note.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from transformers import GenerationConfig

from export import gguf_file, library_messages
from export.errors import ExportError
from runtime.bundle import SamplingDefaults

FILE = "generation_config.json"
_GGUF = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def read_sampling(folder: Path, gguf_file: str | None = None) -> tuple[SamplingDefaults, tuple[str, ...]]:
    """What the model in `folder`, or the file `gguf_file` in it, recommends, and notes on what of it cannot be meant.

    Raises ExportError where the file is not to be read.
    """
    if gguf_file is not None:
        return _of_gguf(folder / gguf_file)
    path = folder / FILE
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return SamplingDefaults(), ()
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not valid JSON ({error}); fetch it again, or remove it") from error
    if not isinstance(values, dict):
        raise ExportError(f"{path} is not a JSON object; fetch it again, or remove it")
    sampling, notes = _checked(values, FILE)
    return (msgspec.structs.replace(sampling, temperature=0.0) if values.get("do_sample") is False else sampling), notes


def fault(folder: Path) -> str | None:
    """What is wrong with generation_config.json in `folder`, in a sentence; None where transformers can read it, or it is not
    there.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        with library_messages.listening([]):
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever an entry can be wrong in
        said = library_messages.in_few_words(str(error) or type(error).__name__)
        return f"{folder / FILE} cannot be read by transformers ({said}); correct that entry, or remove the file"
    return None


def described(sampling: SamplingDefaults) -> str:
    """`sampling` in words, as `temperature 0.2, top_p 0.9`; empty where it says nothing."""
    return ", ".join(f"{name} {value:g}" for name, value in msgspec.to_builtins(sampling).items())


def _of_gguf(path: Path) -> tuple[SamplingDefaults, tuple[str, ...]]:
    metadata = gguf_file.keys(path)
    values = {name: metadata[key] for name, key in _GGUF.items() if key in metadata}
    # Its numbers have 32 bits: 0.2 is 0.200000003.
    values = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
    return _checked(values, path.name)


def _checked(values: Mapping[str, Any], where: str) -> tuple[SamplingDefaults, tuple[str, ...]]:
    """The `values` that requests could have as well, and a note on each of the others."""
    sampling, notes = SamplingDefaults(), []
    for name in SamplingDefaults.__struct_fields__:
        value = values.get(name)
        if value is None:
            continue
        try:
            one = msgspec.convert({name: _number(name, value)}, SamplingDefaults)
        except msgspec.ValidationError as error:
            reason = str(error).partition(" - at ")[0]
            notes.append(f"{name} in {where} is left out: {reason[0].lower()}{reason[1:]}, and it is {value!r}")
            continue
        sampling = one.over(sampling)
    return sampling, tuple(notes)


def _number(name: str, value: Any) -> Any:
    """`value` as requests have it: of top-k, -1 stands for all tokens, and 50.0 for 50."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # which is refused as what it is: no number that counts
    if name == "top_k" and isinstance(value, float) and value.is_integer():
        value = int(value)
    return 0 if name == "top_k" and value == -1 and not isinstance(value, bool) else value
