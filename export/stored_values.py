"""Whether a loaded model has the very numbers that its checkpoint stores.

transformers initializes some modules after it has loaded them, and one that does so without a look at what is there (a padding
token's row of the embeddings set to zero, in Youtu) leaves another model than the one that was published. The engine would be
compared with that one, and agree with it.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from export.checkpoint_files import CONFIG, FLOATS, CheckpointFiles

_ROUNDED = 0.01
"""By which frequencies that were stored in 16 bits may differ."""


def restore(model: PreTrainedModel, files: CheckpointFiles) -> list[str]:
    """Give `model` the numbers that are stored wherever it has others under the same name; a line on each.

    Weights that transformers makes of others (experts in one tensor, codes with scales) are not looked at.
    """
    weights = model.state_dict(keep_vars=True)
    lines = []
    for name, stored in _stored(model, files, weights):
        weight = weights[name].data
        if weight.shape != stored.shape or not weight.is_floating_point():
            continue
        kept = stored.to(weight.dtype)
        if not torch.equal(weight, kept):
            lines.append(f"transformers changed {_extent(weight, kept)} of {name} after loading; the checkpoint's are used")
            weight.copy_(kept)
    return lines


def _stored(
    model: PreTrainedModel, files: CheckpointFiles, weights: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The names in `weights` under which transformers put what is stored as it is, each with what is stored."""
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    names: dict[str, str] = {}
    for key, tensor in files.tensors.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, weights)
        if name not in weights and key in weights:
            name, pattern = key, None
        if name in weights and pattern is None and tensor.dtype in FLOATS:
            names[key] = name
    for key, stored in _read(files, names):
        yield names[key], stored


def frequencies(model: PreTrainedModel, files: CheckpointFiles) -> list[str]:
    """A line where rotary frequencies are stored, as older versions of transformers did, that are none of the model's."""
    computed = [buffer.flatten() for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    scaling = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if scaling.get("rope_type") == "linear":  # which divided positions then, and divides frequencies now
        computed += [frequencies * scaling["factor"] for frequencies in computed]
    keys = [key for key, tensor in files.tensors.items() if key.endswith("inv_freq") and tensor.dtype in FLOATS]
    for key, tensor in _read(files, keys if computed else ()):
        stored = tensor.flatten().float()
        if not any(len(other) == len(stored) and torch.allclose(stored, other, rtol=_ROUNDED) for other in computed):
            return [f"{key} holds other rotary frequencies than those of {CONFIG}, which transformers and the engine use"]
    return []


def _read(files: CheckpointFiles, keys: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The stored tensors of these keys, file by file, each of which is opened once."""
    by_file: dict[Path, list[str]] = {}
    for key in keys:
        by_file.setdefault(files.tensors[key].file, []).append(key)
    for file, inside in by_file.items():
        get = _reader(file)
        for key in inside:
            yield key, get(key)


def _reader(file: Path) -> Callable[[str], torch.Tensor]:
    """Gives a tensor of the file by its name."""
    if file.suffix == ".safetensors":
        get: Callable[[str], torch.Tensor] = safe_open(file, framework="pt").get_tensor
        return get
    pickled: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    return pickled.__getitem__


def _can_be_mapped(path: Path) -> bool:
    """Whether torch wrote the file as an archive; what it wrote before version 1.6 has to be read whole."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _extent(weight: torch.Tensor, stored: torch.Tensor) -> str:
    """How much of `weight` differs from what is stored, in its rows where it has some."""
    differs = weight != stored
    if weight.dim() < 2:
        return f"{int(differs.sum())} of {weight.numel()} numbers"
    return f"{int(differs.flatten(1).any(dim=1).sum())} of {len(weight)} rows"
