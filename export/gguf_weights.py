"""Which tensor of a GGUF becomes which weight of the transformers model, by architecture; none is left over."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from export.errors import UnsupportedModel
from export.gguf_file import GgufFile

Transform = Callable[[torch.Tensor, PreTrainedConfig], torch.Tensor]
Join = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _one_after_the_other(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cat([first, second], dim=1)


def _in_turns(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.stack([first, second], dim=-1).flatten(-2)


ROPE_FREQS = "rope_freqs.weight"
"""Divides the rotation's frequencies, one number each (Llama 3.1 and later)."""
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""Divide them past the original context length and below it (longrope)."""
ROPE = {ROPE_FREQS, ROPE_LONG, ROPE_SHORT}
"""The tensors that belong to the configuration, not to the weights."""
_LAYER_NUMBER = re.compile(r"(?<=^blk\.)\d+(?=\.)")


@dataclass(frozen=True)
class Place:
    """Where a tensor of a GGUF goes in the model."""

    name: str
    """A module, to which the tensor's own `.weight` or `.bias` is appended, or a parameter; `{}` is the layer's number."""
    transform: Transform | None = None
    """What is done to the weight."""
    bias: Transform | None = None
    """What is done to the bias."""
    half: int | None = None
    """0 or 1 where two tensors become one."""
    join: Join = _one_after_the_other
    """How the two halves are joined."""
    heads: bool = False
    """The tensor's rows are a parameter each, numbered by the second `{}`."""


Places = Mapping[str, Place]
"""Places by the tensor's name, with `{}` for the layer's number: without `.weight` or `.bias` where the place is a module."""


def state_dict(
    file: GgufFile, places: Places, config: PreTrainedConfig, share: Callable[[float], None] = lambda share: None
) -> dict[str, torch.Tensor]:
    """The model's weights in float32, by their names in the model; `share` is told how much is read, from 0 to 1.

    Raises UnsupportedModel for a tensor that has no place in the model.
    """
    weights: dict[str, torch.Tensor] = {}
    halves: dict[str, dict[int, torch.Tensor]] = {}
    joins: dict[str, Join] = {}
    if strange := [name for name in file.tensor_names if name not in ROPE and _place(name, places) is None]:
        more = f" and {len(strange) - 1} more tensors" if strange[1:] else ""
        raise UnsupportedModel(
            f"{file.path} holds {strange[0]}{more}, which a model of the architecture {file.architecture} has no place for:"
            " export the original model's folder instead"
        )
    for done, (name, tensor) in enumerate(file.tensors(), 1):
        share(done / len(file.tensor_names))
        found = _place(name, places)
        if found is None:
            continue
        place, layer, suffix = found
        transform = place.bias if suffix == ".bias" else place.transform
        value = tensor if transform is None else transform(tensor, config)
        target = place.name.format(*layer, "{}") + suffix
        if place.heads:
            weights |= {target.format(head): row.clone() for head, row in enumerate(value)}
        elif place.half is None:
            weights[target] = value
        else:
            halves.setdefault(target, {})[place.half] = value
            joins[target] = place.join
    return weights | {target: joins[target](both[0], both[1]) for target, both in halves.items() if len(both) == 2}


def _place(name: str, places: Places) -> tuple[Place, list[str], str] | None:
    """The place of the tensor `name`, its layer's number, and the `.weight` or `.bias` that is appended to the place's name."""
    plain, layer = _LAYER_NUMBER.sub("{}", name), _LAYER_NUMBER.findall(name)
    if plain in places:
        return places[plain], layer, ""
    module, dot, suffix = plain.rpartition(".")
    if module not in places or suffix not in ("weight", "bias"):
        return None
    return places[module], layer, dot + suffix


def _unpermuted(heads: Callable[[Any], int]) -> Transform:
    """Undo the order of rows in which llama.cpp turns neighbours, where transformers turns halves."""

    def transform(weight: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
        count = heads(config)
        pairs = weight.reshape(count, weight.shape[0] // count // 2, 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape)

    return transform


def _minus_one(weight: torch.Tensor, _: PreTrainedConfig) -> torch.Tensor:
    """The norm's weight around zero, as transformers keeps it; a GGUF keeps it around one."""
    return weight - 1


def _transposed(weight: torch.Tensor, _: PreTrainedConfig) -> torch.Tensor:
    return weight.T.contiguous()


def _turned(weight: torch.Tensor, _: PreTrainedConfig) -> torch.Tensor:
    """Experts' matrices that transformers keeps the other way around."""
    return weight.transpose(1, 2).contiguous()


def _row(weight: torch.Tensor, _: PreTrainedConfig) -> torch.Tensor:
    return weight.reshape(1, -1)


def _interleaved(weight: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Bloom's rows: a head's query, key and value one after the other, where a GGUF has all queries first."""
    heads: int = config.num_attention_heads
    return weight.reshape(3, heads, -1, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


def _grouped(weight: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Falcon 40B's rows: a group's queries, its key and its value, where a GGUF has all queries, then keys, then values."""
    if not config.new_decoder_architecture:
        return weight
    groups, size = config.num_kv_heads, config.hidden_size // config.num_attention_heads
    query, key, value = torch.split(weight, [config.num_attention_heads * size, groups * size, groups * size])
    rows = [part.reshape(groups, -1, size, weight.shape[1]) for part in (query, key, value)]
    return torch.cat(rows, dim=1).reshape(weight.shape)


_LAYER = "model.layers.{}."
_ENDS = {"token_embd": Place("model.embed_tokens"), "output_norm": Place("model.norm"), "output": Place("lm_head")}
_ATTENTION = {
    "blk.{}.attn_norm": Place(_LAYER + "input_layernorm"),
    "blk.{}.attn_q": Place(_LAYER + "self_attn.q_proj"),
    "blk.{}.attn_k": Place(_LAYER + "self_attn.k_proj"),
    "blk.{}.attn_v": Place(_LAYER + "self_attn.v_proj"),
    "blk.{}.attn_output": Place(_LAYER + "self_attn.o_proj"),
    "blk.{}.ffn_norm": Place(_LAYER + "post_attention_layernorm"),
}
_MLP = {
    "blk.{}.ffn_gate": Place(_LAYER + "mlp.gate_proj"),
    "blk.{}.ffn_up": Place(_LAYER + "mlp.up_proj"),
    "blk.{}.ffn_down": Place(_LAYER + "mlp.down_proj"),
}
_EXPERTS = {
    "blk.{}.ffn_gate_inp": Place(_LAYER + "mlp.gate"),
    "blk.{}.ffn_gate_exps.weight": Place(_LAYER + "mlp.experts.gate_up_proj", half=0),
    "blk.{}.ffn_up_exps.weight": Place(_LAYER + "mlp.experts.gate_up_proj", half=1),
    "blk.{}.ffn_down_exps.weight": Place(_LAYER + "mlp.experts.down_proj"),
}
_TURN_QUERIES, _TURN_KEYS = (
    _unpermuted(lambda config: config.num_attention_heads),
    _unpermuted(lambda config: config.num_key_value_heads),
)
_TURNED = {
    "blk.{}.attn_q": Place(_LAYER + "self_attn.q_proj", _TURN_QUERIES, _TURN_QUERIES),
    "blk.{}.attn_k": Place(_LAYER + "self_attn.k_proj", _TURN_KEYS, _TURN_KEYS),
}
_BLOCK = "transformer.h.{}."

DENSE = _ENDS | _ATTENTION | _MLP
QK_NORMS = {
    "blk.{}.attn_q_norm": Place(_LAYER + "self_attn.q_norm"),
    "blk.{}.attn_k_norm": Place(_LAYER + "self_attn.k_norm"),
}
LLAMA = DENSE | _TURNED
MIXTRAL = _ENDS | _ATTENTION | _TURNED | _EXPERTS
QWEN3MOE = _ENDS | _ATTENTION | QK_NORMS | _EXPERTS
QWEN2MOE = (
    _ENDS
    | _ATTENTION
    | _EXPERTS
    | {
        "blk.{}.ffn_gate_inp_shexp": Place(_LAYER + "mlp.shared_expert_gate", _row),
        "blk.{}.ffn_gate_shexp": Place(_LAYER + "mlp.shared_expert.gate_proj"),
        "blk.{}.ffn_up_shexp": Place(_LAYER + "mlp.shared_expert.up_proj"),
        "blk.{}.ffn_down_shexp": Place(_LAYER + "mlp.shared_expert.down_proj"),
    }
)
MINIMAX_M2 = QWEN3MOE | {"blk.{}.exp_probs_b.bias": Place(_LAYER + "mlp.e_score_correction_bias")}
GPT_OSS = (
    _ENDS
    | _ATTENTION
    | {
        "blk.{}.attn_sinks.weight": Place(_LAYER + "self_attn.sinks"),
        "blk.{}.post_attention_norm": Place(_LAYER + "post_attention_layernorm"),
        "blk.{}.ffn_gate_inp": Place(_LAYER + "mlp.router"),
        "blk.{}.ffn_gate_exps.weight": Place(_LAYER + "mlp.experts.gate_up_proj", _turned, half=0, join=_in_turns),
        "blk.{}.ffn_up_exps.weight": Place(_LAYER + "mlp.experts.gate_up_proj", _turned, half=1, join=_in_turns),
        "blk.{}.ffn_down_exps.weight": Place(_LAYER + "mlp.experts.down_proj", _turned),
        "blk.{}.ffn_gate_exps.bias": Place(_LAYER + "mlp.experts.gate_up_proj_bias", half=0, join=_in_turns),
        "blk.{}.ffn_up_exps.bias": Place(_LAYER + "mlp.experts.gate_up_proj_bias", half=1, join=_in_turns),
        "blk.{}.ffn_down_exps.bias": Place(_LAYER + "mlp.experts.down_proj_bias"),
    }
)
PHI3 = _ENDS | {
    "blk.{}.attn_norm": _ATTENTION["blk.{}.attn_norm"],
    "blk.{}.attn_qkv": Place(_LAYER + "self_attn.qkv_proj"),
    "blk.{}.attn_output": _ATTENTION["blk.{}.attn_output"],
    "blk.{}.ffn_norm": _ATTENTION["blk.{}.ffn_norm"],
    "blk.{}.ffn_up": Place(_LAYER + "mlp.gate_up_proj"),
    "blk.{}.ffn_down": _MLP["blk.{}.ffn_down"],
}
GEMMA = {
    "token_embd": _ENDS["token_embd"],
    "output_norm": Place("model.norm", _minus_one),
    **_ATTENTION,
    **_MLP,
    "blk.{}.attn_norm": Place(_LAYER + "input_layernorm", _minus_one),
    "blk.{}.ffn_norm": Place(_LAYER + "post_attention_layernorm", _minus_one),
}
GEMMA2 = GEMMA | {
    "blk.{}.post_attention_norm": Place(_LAYER + "post_attention_layernorm", _minus_one),
    "blk.{}.ffn_norm": Place(_LAYER + "pre_feedforward_layernorm", _minus_one),
    "blk.{}.post_ffw_norm": Place(_LAYER + "post_feedforward_layernorm", _minus_one),
}
GEMMA3 = GEMMA2 | {
    "output": _ENDS["output"],
    "blk.{}.attn_q_norm": Place(_LAYER + "self_attn.q_norm", _minus_one),
    "blk.{}.attn_k_norm": Place(_LAYER + "self_attn.k_norm", _minus_one),
}
_PLAIN = {name: Place(place.name) for name, place in GEMMA3.items()}
GEMMA4 = _PLAIN | {
    "blk.{}.layer_output_scale.weight": Place(_LAYER + "layer_scalar"),
    "per_layer_token_embd": Place("model.embed_tokens_per_layer"),
    "per_layer_model_proj": Place("model.per_layer_model_projection"),
    "per_layer_proj_norm": Place("model.per_layer_projection_norm"),
    "blk.{}.inp_gate": Place(_LAYER + "per_layer_input_gate"),
    "blk.{}.proj": Place(_LAYER + "per_layer_projection"),
    "blk.{}.post_norm": Place(_LAYER + "post_per_layer_input_norm"),
}
STARCODER2 = (
    _ENDS
    | _ATTENTION
    | {
        "blk.{}.ffn_up": Place(_LAYER + "mlp.c_fc"),
        "blk.{}.ffn_down": Place(_LAYER + "mlp.c_proj"),
    }
)
STABLELM = DENSE | {
    "blk.{}.attn_q_norm": Place(_LAYER + "self_attn.q_layernorm.norms.{}", heads=True),
    "blk.{}.attn_k_norm": Place(_LAYER + "self_attn.k_layernorm.norms.{}", heads=True),
}
NEMOTRON = DENSE | {
    "output_norm": Place("model.norm", _minus_one),
    "blk.{}.attn_norm": Place(_LAYER + "input_layernorm", _minus_one),
    "blk.{}.ffn_norm": Place(_LAYER + "post_attention_layernorm", _minus_one),
}
GPT2 = {
    "token_embd": Place("transformer.wte"),
    "position_embd": Place("transformer.wpe"),
    "output_norm": Place("transformer.ln_f"),
    "output": _ENDS["output"],
    "blk.{}.attn_norm": Place(_BLOCK + "ln_1"),
    "blk.{}.attn_qkv": Place(_BLOCK + "attn.c_attn", _transposed),
    "blk.{}.attn_output": Place(_BLOCK + "attn.c_proj", _transposed),
    "blk.{}.ffn_norm": Place(_BLOCK + "ln_2"),
    "blk.{}.ffn_up": Place(_BLOCK + "mlp.c_fc", _transposed),
    "blk.{}.ffn_down": Place(_BLOCK + "mlp.c_proj", _transposed),
}
_TALL = {
    "token_embd": Place("transformer.word_embeddings"),
    "output_norm": Place("transformer.ln_f"),
    "output": _ENDS["output"],
    "blk.{}.attn_output": Place(_BLOCK + "self_attention.dense"),
    "blk.{}.ffn_up": Place(_BLOCK + "mlp.dense_h_to_4h"),
    "blk.{}.ffn_down": Place(_BLOCK + "mlp.dense_4h_to_h"),
}
BLOOM = _TALL | {
    "token_embd_norm": Place("transformer.word_embeddings_layernorm"),
    "blk.{}.attn_norm": Place(_BLOCK + "input_layernorm"),
    "blk.{}.attn_qkv": Place(_BLOCK + "self_attention.query_key_value", _interleaved, _interleaved),
    "blk.{}.ffn_norm": Place(_BLOCK + "post_attention_layernorm"),
}
FALCON = _TALL | {
    "blk.{}.attn_norm": Place(_BLOCK + "input_layernorm"),
    "blk.{}.attn_qkv": Place(_BLOCK + "self_attention.query_key_value", _grouped),
}
FALCON_NEW = FALCON | {
    "blk.{}.attn_norm": Place(_BLOCK + "ln_mlp"),
    "blk.{}.attn_norm_2": Place(_BLOCK + "ln_attn"),
}
