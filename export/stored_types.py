"""Whether a checkpoint's weights are numbers as they are stored, or codes that mean something only with their scales.

Codes that are loaded as numbers give a model that runs, agrees with itself, and says nonsense; the engine and its reference
would be wrong in the same way. So each claim of a quantization that the files make is either applied by transformers, on a CPU,
to the very numbers that the codes stand for (`APPLIED`; tests compute them on their own), or the checkpoint is refused.
"""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config, QuantizationConfigMixin

from export.checkpoint_files import AGAIN, CONFIG, FLOATS, CheckpointFiles, StoredTensor, read_json
from export.errors import ExportError

APPLIED: dict[str, type[QuantizationConfigMixin]] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Methods whose codes transformers turns into the numbers that they stand for, on a CPU and in float32."""
_CLAIMS = ("quantization_config", "compression_config", "quant_config", "quantization")
"""Keys of config.json, or of a configuration in it; the last one is MLX's."""
_SIDECARS = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quanto_qmap.json": "quanto",
}
"""Files beside config.json that say how weights were quantized, and by whom."""
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "modelopt": "NVIDIA's ModelOpt",
    "mlx": "MLX",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "FBGEMM's float8",
    "auto-round": "AutoRound",
    "torchao": "torchao",
    "quanto": "Quanto",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "bitnet": "BitNet",
    "quark": "AMD's Quark",
}
_CODES = re.compile(r"(^|[._])(weight|qweight|weight_packed|kernel|blocks|codes|w_q|Wq)$")
"""Ends the names of matrices."""
SCALES = re.compile(
    r"(scale|scales|scale_inv|_scale_\d|qscale_\w+|absmax|qzeros|zeros|zero_point|g_idx|quant_map|quant_state\S*|SCB|amax"
    r"|weight_shape|biases)$"
)
"""Ends the names of what makes numbers of codes."""
_BLOCK_TYPES = ("F8_", "F4", "F6", "I4", "U4")
_CODE_TYPES = (*_BLOCK_TYPES, "I8", "U8", "int8", "uint8")
"""Begins the names of types that the applied methods store codes in."""


def quantization(files: CheckpointFiles) -> QuantizationConfigMixin | None:
    """How the weights are to be turned into numbers when they are loaded; None where they are numbers.

    Raises ExportError for a quantization that would not be applied, and for codes that nothing declares.
    """
    claims = list(_claims(files))
    for place, method, _, applies in claims:
        if not (applies and method in APPLIED):
            raise ExportError(_not_applied(files, place, method))
    _check_pickled(files)
    if not claims:
        _check_declared(files)
        return None
    place, method, content, _ = claims[0]
    if method == "fp8":
        _check_blocks(files, content, place)
    try:
        made: QuantizationConfigMixin = APPLIED[method].from_dict({**content, "dequantize": True})
    except Exception as error:  # whatever an entry that is none makes of it
        raise ExportError(_unreadable(files, place, error)) from error
    return made


def _unreadable(files: CheckpointFiles, place: str, error: object) -> str:
    return f"{files.folder}: {place} is none that transformers can read ({error}); {AGAIN}"


def _claims(files: CheckpointFiles) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """(where it says so, method, what it says, whether transformers looks there) of every quantization that the files claim."""
    for where, config in _configurations(files.config):
        for key in _CLAIMS:
            content = config.get(key)
            if isinstance(content, dict) and content:
                place = f"{key} in {where or CONFIG}"
                yield place, _method(key, content), content, key == "quantization_config" and where in ("", "text_config")
    if not any(isinstance(files.config.get(key), dict) and files.config[key] for key in _CLAIMS):
        for name, method in _SIDECARS.items():
            if (files.folder / name).exists():
                content = read_json(files.folder / name)
                said = content.get("quant_method") if isinstance(content, dict) else None
                yield name, str(said or method), {}, False


def _configurations(config: dict[str, Any], where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The configuration and those in it, by their paths."""
    yield where, config
    for name, value in config.items():
        if isinstance(value, dict) and name not in _CLAIMS:
            yield from _configurations(value, f"{where}.{name}" if where else name)


def _method(key: str, content: dict[str, Any]) -> str:
    if key == "quantization":
        return "mlx"
    if content.get("load_in_4bit") or content.get("load_in_8bit"):
        return "bitsandbytes"
    return str(content.get("quant_method") or content.get("quant_algo") or "an unnamed method")


def _not_applied(files: CheckpointFiles, place: str, method: str) -> str:
    return (
        f"{files.folder} is quantized with {_NAMES.get(method, method)} ({place}), whose codes transformers does not turn into "
        f"numbers on a CPU; give {_original(files.folder)}, which is quantized here (--precision int4). If these weights are "
        f"numbers already, delete {place.replace(' in ', ' from ')}"
    )


def _original(folder: Path) -> str:
    """The model that this one was made from, as its card has it."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:10_000]
    except OSError:
        card = ""
    named = re.search(r"^base_model:\s*(?:\n\s*-\s*)?['\"]?([\w.-]+/[\w.-]+)", card, re.MULTILINE)
    return f"the model that it was made from ({named[1]})" if named else "the model that it was made from"


def _check_declared(files: CheckpointFiles) -> None:
    """Refuse matrices of codes that no configuration speaks of, before they are loaded."""
    for name, tensor in files.tensors.items():
        if tensor.dtype.startswith(_BLOCK_TYPES) or (tensor.dtype not in FLOATS and _CODES.search(name)):
            raise ExportError(_codes(files, name, tensor.dtype))


def _codes(files: CheckpointFiles, name: str, dtype: str) -> str:
    scale = next((other for other in files.tensors if SCALES.search(other) and other.startswith(name.rpartition(".")[0])), None)
    beside = f" (its scale may be {scale})" if scale else ""
    return (
        f"{files.folder} stores {name} as {dtype}: codes, not numbers{beside}, and its {CONFIG} has no quantization_config "
        f"that says what they stand for; give {_original(files.folder)}, or the checkpoint with its authors' {CONFIG}"
    )


def widen(model: torch.nn.Module) -> None:
    """Make float32 of the weights that were left in 16 bits, where they are numbers as they are: it holds them all.

    transformers does so itself, but not for what stands beside codes: a checkpoint in float8 has its norms and embeddings in
    bfloat16.
    """
    for weight in (*model.parameters(), *model.buffers()):
        if weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()


def check_loaded(model: torch.nn.Module, files: CheckpointFiles) -> None:
    """Refuse weights of `model` that are not numbers, and stored codes that were loaded as if they were. Raises ExportError."""
    state = dict(model.state_dict())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in (*model.named_parameters(), *state.items()):
        if tensor.dtype not in (torch.float32, torch.float64) and (tensor.is_floating_point() or name in parameters):
            raise ExportError(_unscaled(files, name, str(tensor.dtype).removeprefix("torch.")))
    counts = {name for name, tensor in state.items() if not tensor.is_floating_point()}
    applied = _CODE_TYPES if getattr(model, "hf_quantizer", None) is not None or any(True for _ in _claims(files)) else ()
    for name, stored in files.tensors.items():
        if stored.dtype in FLOATS or stored.dtype.startswith(tuple(applied)) or _known(name, counts):
            continue
        if _known(name, state.keys() - counts):
            raise ExportError(_codes(files, name, stored.dtype))


def _unscaled(files: CheckpointFiles, name: str, dtype: str) -> str:
    return (
        f"{files.folder} stores {name} as {dtype}, and nothing says what its codes stand for (its scale is missing, or its "
        f"layer is among those that were not converted); give {_original(files.folder)}"
    )


def _known(name: str, names: Any) -> bool:
    return name in names or any(other.endswith("." + name) or name.endswith("." + other) for other in names)


def _check_blocks(files: CheckpointFiles, content: dict[str, Any], place: str) -> None:
    """Refuse float8 weights without a scale, and blocks that transformers would cut at other places than they were made.

    It divides a matrix evenly by its scales, so the last block must be whole: 200 rows in blocks of 128 have two scales, for
    128 and 72 rows, of which it makes 100 and 100.
    """
    size = content.get("weight_block_size")
    block = tuple(size) if isinstance(size, list | tuple) and len(size) == 2 else None
    if block is not None and not all(type(side) is int and side > 0 for side in block):
        raise ExportError(_unreadable(files, place, f"weight_block_size {size!r}"))
    for name, tensor in files.tensors.items():
        if not tensor.dtype.startswith(_BLOCK_TYPES) and not (tensor.dtype in ("I8", "U8") and name.endswith("weight")):
            continue
        if SCALES.search(name):
            continue
        scale = _scale(files.tensors, name)
        if scale is None:
            raise ExportError(_unscaled(files, name, tensor.dtype))
        if not _divides(tensor, scale, block):
            raise ExportError(
                f"{files.folder} stores {name} {list(tensor.shape)} in blocks of {size} with scales {list(scale.shape)}: the "
                f"last block is not whole, and transformers applies such scales to the wrong rows; give "
                f"{_original(files.folder)}"
            )


def _scale(tensors: dict[str, StoredTensor], name: str) -> StoredTensor | None:
    stem = name.removesuffix("weight").removesuffix(".")
    for scale in (f"{name}_scale_inv", f"{stem}.scale", f"{stem}.qscale_weight"):
        if scale in tensors:
            return tensors[scale]
    return None


def _divides(tensor: StoredTensor, scale: StoredTensor, block: tuple[int, ...] | None) -> bool:
    """Whether dividing the matrix evenly by its scales gives the blocks that they were made for."""
    if len(scale.shape) < 2:
        return scale.shape in ((), (1,))
    for axis, common in ((-2, (1,)), (-1, (32,))):
        size, count = tensor.shape[axis], scale.shape[axis]
        if axis == -1 and tensor.dtype in ("I8", "U8"):
            size *= 2  # two 4-bit codes a byte
        whole = (*common, size, *((block[axis],) if block else ()))
        if count < 1 or size % count or size // count not in whole:
            return False
    return True


def _check_pickled(files: CheckpointFiles) -> None:
    """Look at the types of weights that are pickled, as far as that runs no code. Raises ExportError."""
    for path in (path for path in files.weights if path.suffix != ".safetensors"):
        try:
            stored = torch.load(path, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ExportError(_more_than_weights(path, error)) from error
        except Exception as error:  # torch raises whatever reading the archive did
            raise ExportError(f"{path} is damaged or cut off; {AGAIN}") from error
        if not isinstance(stored, dict):
            raise ExportError(f"{path} holds a {type(stored).__name__} in the place of weights by their names; {AGAIN}")
        for name, tensor in stored.items():
            if isinstance(tensor, torch.Tensor):
                files.tensors[str(name)] = StoredTensor(_stored_type(tensor.dtype), tuple(tensor.shape), path)


def _stored_type(dtype: torch.dtype) -> str:
    """The name of `dtype` as safetensors writes it."""
    named = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return named.get(dtype) or ("F8_" if dtype.is_floating_point else "") + str(dtype).removeprefix("torch.")


def _more_than_weights(path: Path, error: Exception) -> str:
    named = re.search(r"(?:GLOBAL|Unsupported (?:global|class)[^\w]*)\s*([\w.]+)", str(error))
    what = f" (it would call {named[1]})" if named else ""
    return (
        f"{path} holds more than weights{what}: reading it would run Python code, and was stopped; take a version with "
        "safetensors, or convert it where you trust it"
    )
