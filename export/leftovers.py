"""Weights of a checkpoint that the loaded model has no place for: which of them are no part of it, by what shows it."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from export.checkpoint_files import CheckpointFiles, StoredTensor
from runtime.bundle import Task

_DRAFT = re.compile(r"(^|\.)(mtp|mtp_\w+|nextn|nextn_\w+)(\.|$)")
_DRAFT_COUNT = re.compile(r"(nextn|mtp)", re.IGNORECASE)
"""In the keys that say how many layers guess ahead: num_nextn_predict_layers, mtp_num_hidden_layers, ..."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_OTHER_INPUTS = {
    "vision_config": re.compile(r"vision|visual|(^|[._])(vit|image|img|mm|multi_?modal)([._]|$)|multi_modal|patch_embed"),
    "audio_config": re.compile(r"audio|speech|sound|(^|[._])(mm|multi_?modal)([._]|$)|multi_modal"),
    "image_config": re.compile(r"image|vision|visual"),
    "speech_config": re.compile(r"speech|audio"),
    "video_config": re.compile(r"video"),
}
"""Parts that read images or sound, by their configuration's name and what is in their weights' names."""
_HEADS = (
    *("lm_head", "cls", "classifier", "score", "qa_outputs", "pooler", "mlm_head", "head", "decoder", "predictions"),
    *("vocab_transform", "vocab_layer_norm", "vocab_projector", "generator_lm_head", "discriminator_predictions"),
)
"""First parts of the names of what stands behind the hidden states, from which embeddings are made."""
_TABLES = re.compile(r"(^|\.)(rotary_emb\.inv_freq|inv_freq|position_ids|masked_bias)$")
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.(bias|mask|causal_mask)$")


@dataclass(frozen=True)
class Leftovers:
    """What becomes of weights that the model has no place for."""

    lines: list[str] = field(default_factory=list)
    """On what is no part of the model, and was left out."""
    unexplained: list[str] = field(default_factory=list)


def sort(model: PreTrainedModel, unexpected: Collection[str], files: CheckpointFiles | None, task: Task) -> Leftovers:
    """Sort the names `unexpected`: tables, layers that guess ahead, parts for images or sound, other heads, and the rest."""
    config = {} if files is None else files.config
    tensors = {} if files is None else files.tensors
    found: dict[str, list[str]] = {}
    unexplained = []
    for name in sorted(unexpected):
        if _is_table(name, tensors.get(name)):
            continue
        what = _what(name, model, config, tensors, task)
        if what is None:
            unexplained.append(name)
        else:
            found.setdefault(what, []).append(name)
    lines = [f"left out: {what} ({len(names)} weights, {names[0]} for one)" for what, names in found.items()]
    return Leftovers(lines, unexplained)


def _is_table(name: str, stored: StoredTensor | None) -> bool:
    """Rotary frequencies, positions and causal masks, which older versions stored and every model computes."""
    if _TABLES.search(name):
        return True
    square = stored is not None and len(stored.shape) == 4 and stored.shape[:2] == (1, 1) and stored.shape[2] == stored.shape[3]
    return _CAUSAL_MASK.search(name) is not None and square


def _what(
    name: str, model: PreTrainedModel, config: dict[str, Any], tensors: dict[str, StoredTensor], task: Task
) -> str | None:
    """What the weight `name` belongs to that is no part of `model`; None where nothing shows it."""
    if _DRAFT.search(name) or _beyond(name, config):
        return "layers that guess several tokens ahead"
    for key, pattern in _OTHER_INPUTS.items():
        if isinstance(config.get(key), dict) and pattern.search(name) and not _has_part(model, name, pattern):
            return "parts for images and sound"
    if task == "feature-extraction" and _is_head(name, model.base_model_prefix, tensors):
        return "heads behind the hidden states"
    return None


def _beyond(name: str, config: dict[str, Any]) -> bool:
    """Whether the weight is of a layer after the model's last one, where the configuration says that these guess ahead."""
    numbered = _LAYER.search(name)
    for inner in _nested(config):
        layers = inner.get("num_hidden_layers")
        ahead = [value for key, value in inner.items() if _DRAFT_COUNT.search(key) and type(value) is int]
        if numbered and type(layers) is int and ahead and layers <= int(numbered[1]) < layers + max(ahead):
            return True
    return False


def _nested(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _nested(value)


def _has_part(model: torch.nn.Module, name: str, pattern: re.Pattern[str]) -> bool:
    """Whether the model has the part that the weight `name` is of, so that this weight of it should have been loaded."""
    first = next((part for part in name.split(".") if pattern.search(part)), name)
    return any(first in module.split(".") for module, _ in model.named_modules())


def _is_head(name: str, prefix: str, tensors: dict[str, StoredTensor]) -> bool:
    """Whether the weight stands beside the base model, not in it."""
    if name.split(".")[0] in _HEADS:
        return True
    return bool(prefix) and not name.startswith(f"{prefix}.") and any(other.startswith(f"{prefix}.") for other in tensors)
