"""Tiny random models of any causal-LM type that transformers knows, and their tokens through an engine.

A type's configuration is its own default with every size cut down; `TYPES` holds what a type needs beyond that. What
differs between types lives here, as test data: `export` has no code for any of them.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from export import decoder, fuse, graph, sampler, verify
from export.greedy import answer as answer_greedily
from runtime.bundle import Layer, Variant
from runtime.ort import OrtEngine

ALL: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Every causal-LM type of the installed transformers."""

VOCAB = 128
PROMPTS = (5, 13, 22, 36, 70)
"""Lengths of the prompts: one within a chunk, one past the sliding window, one of several chunks, one whose answer passes
`ORIGINAL` positions, one past them. The last in a batch ends where its slot does."""
POSITIONS = 256
CHUNK = 6
TOKENS = 15
WINDOW = 8
TIE = 1e-4
"""A gap between the two best logits, as a part of the row's spread, at which rounding may choose the other."""
ORIGINAL = 40
"""Positions that a model was trained on first, past which some scale or turn otherwise."""
SPREAD = 0.15
"""Standard deviation of weights; at the usual 0.02 a tiny model repeats its input's token whatever came before."""

MOST_KINDS = 4
"""Different values in a list of one value a layer; a list with more numbers the layers rather than saying their kind."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "encoder_layers": 1,
    "encoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_layers": 2,
    "decoder_ffn_dim": 96,
    "decoder_attention_heads": 4,
    "ffn_dim": 96,
    "index_head_dim": 32,
    "index_n_heads": 16,
    "index_topk": WINDOW,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "rotary_dim": 8,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "num_nextn_predict_layers": 0,
    "is_decoder": True,
    "attention_chunk_size": WINDOW,
    "window_size": WINDOW,
    "local_attention": WINDOW,
    "sliding_window_size": WINDOW,
    "query_pre_attn_scalar": 16,
    "original_max_position_embeddings": ORIGINAL,
    "floor_scale": WINDOW,
    "layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "num_mel_bins": 8,
    "image_size": 28,
    "patch_size": 14,
    "num_codebooks": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "n_shared_experts": 1,
    "adapter_in_dim": 64,
    "adapter_out_dim": 64,
    "adapter_input_size": 64,
    "hidden_size_global": 128,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": WINDOW,
    "indexer_compress_ratio": 4,
}
"""What becomes of a field, in whatever configuration it stands."""

ECHOING = {
    *("biogpt", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4_unified", "gemma4_unified_text"),
    *("minicpm3", "vaultgemma", "xglm"),
}
"""Types whose tied, scaled embeddings drown the layers: the best next token is the last one. Theirs are made small."""

_ALL_SHARED = {
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}

TYPES: dict[str, dict[str, Any]] = {
    "blt": {"global_config": {"hidden_size": 128}},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "gemma3n_text": {"num_hidden_layers": 5, "num_kv_shared_layers": 2},
    "gemma4_text": {"num_hidden_layers": 5, "num_kv_shared_layers": 2, "global_head_dim": 32},
    "gemma4": {"text_config": {"num_hidden_layers": 5, "num_kv_shared_layers": 2, "global_head_dim": 32}},
    "gemma4_assistant": {"backbone_hidden_size": 64, "text_config": {"model_type": "gemma4_text", **_ALL_SHARED}},
    "gemma4_unified_assistant": {
        "backbone_hidden_size": 64,
        "text_config": {"model_type": "gemma4_unified_text", **_ALL_SHARED},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hrm_text": {"num_layers_per_stack": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 2},
    "minimax_m3_vl_text": {"index_n_heads": 2, "layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 16), "attention_head_size": 16},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "enable_pronunciation": False, "enable_shape": False},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type needs beyond `SIZES`."""

_HALF = 8
"""Rotary frequencies of a head."""
_ORIGINAL = {"rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL}

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3, longrope": (
        "phi3",
        {
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1 + 0.05 * i for i in range(_HALF)],
                "long_factor": [1.5 + 0.5 * i for i in range(_HALF)],
                **_ORIGINAL,
            },
        },
    ),
    "llama, dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **_ORIGINAL}}),
    "llama, llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                **_ORIGINAL,
            }
        },
    ),
}
"""Options of types that change what a model does at some position, by a name of their own: the type, and what it needs."""


@dataclass(frozen=True)
class Comparison:
    """An engine's greedy tokens beside those of transformers."""

    tokens: int
    """Tokens compared, of all prompts."""
    ties: int
    """Tokens that differ where the reference's two best logits are within `TIE`."""
    different: tuple[str, ...]
    """A sentence for each prompt that departs from the reference."""
    fused: int
    """Layers that GroupQueryAttention serves."""
    layers: int


def configuration(model_type: str) -> PreTrainedConfig:
    """The default configuration of `model_type`, or of one of `OPTIONS`, with every size cut down."""
    model_type, changes = OPTIONS.get(model_type, (model_type, TYPES.get(model_type, {})))
    default = CONFIG_MAPPING[model_type]
    return default(**_shrunk(default, changes))


def model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model of `model_type` in float32, the same for the same seed."""
    torch.manual_seed(seed)
    config = configuration(model_type)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    randomize(made, model_type)
    return made


def randomize(made: PreTrainedModel, model_type: str) -> None:
    """Give `made` weights that let every token depend on those before it."""
    for parameter in made.parameters():
        noise = torch.randn_like(parameter) * SPREAD
        parameter.data = noise if parameter.dim() > 1 else parameter.data + noise / 2
    if model_type in ECHOING:
        next(made.get_input_embeddings().parameters()).data /= 8


def engine(
    made: PreTrainedModel, folder: Path, *, slots: int = 4, context: int = POSITIONS
) -> tuple[OrtEngine, decoder.Survey]:
    """Export `made` into `folder`, as `export` does it, and load it; the slots hold rubbish, as used ones do."""
    seen = decoder.survey(made)
    program = decoder.trace(made, seen)
    fuse.fuse(program)
    vocab = int(made.get_output_embeddings().weight.shape[0])
    sampler.append_sampler(program, vocab)
    graph.tidy(program)
    graph.write(program, folder)
    layers = tuple(Layer(x.index, x.kv_heads, x.key_dim, x.value_dim) for x in seen.layers)
    variant = Variant("tiny", "cpu", "fp32", "float32", graph.MODEL, (), layers, "", length_boundaries=seen.length_boundaries)
    loaded = OrtEngine(folder, variant, vocab, slots=slots, context=min(context, seen.max_length), threads=1)
    for buffer in loaded._kv.values():
        buffer.fill(7)
    return loaded, seen


def prompts(vocab: int, lengths: Sequence[int] = PROMPTS) -> list[list[int]]:
    """Random prompts of the given lengths, the same for the same arguments; special tokens are left out."""
    draw = np.random.default_rng(1)
    return [draw.integers(3, vocab, length).tolist() for length in lengths]


def greedy(loaded: OrtEngine, asked: Sequence[Sequence[int]], count: int = TOKENS) -> list[list[int]]:
    """`count` tokens for each prompt through the decode loop: prefill slot by slot in chunks, decode over all slots at once."""
    return answer_greedily(loaded, [list(prompt) for prompt in asked], count, CHUNK)


def compare(made: PreTrainedModel, folder: Path) -> Comparison:
    """Export `made`, run it, and judge each token by transformers' logits after the same tokens."""
    reference = copy.deepcopy(made)
    loaded, seen = engine(made, folder)
    asked = prompts(min(VOCAB, loaded.vocab_size), (*PROMPTS, loaded.context - TOKENS))
    answers = greedy(loaded, asked)
    ties, different = 0, []
    for prompt, answer in zip(asked, answers, strict=True):
        answer = verify.up_to(answer, seen.padding)
        rows = verify.reference_logits(reference, [*prompt, *answer[:-1]], seen.length_boundaries)[len(prompt) - 1 :]
        best = rows.argmax(-1).tolist()
        for index, (token, expected) in enumerate(zip(answer, best, strict=True)):
            if token == expected:
                continue
            gap = float((rows[index, expected] - rows[index, token]) / (rows[index].max() - rows[index].min()))
            if gap < TIE:
                ties += 1
                continue
            different.append(f"token {index} after {len(prompt)} is {token}, not {expected} (gap {gap:.1e} of the spread)")
            break
    total = sum(map(len, answers))
    return Comparison(total, ties, tuple(different), sum(layer.fused for layer in seen.layers), len(seen.layers))


@torch.no_grad()
def logits(reference: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """transformers' own logits [len(tokens), vocab], in one pass without a cache."""
    result: torch.Tensor = reference(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return result


def _shrunk(default: type[PreTrainedConfig], changes: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a small `default`: `SIZES` where it has the field, short layer lists, then `changes`."""
    try:
        base = default()
    except StrictDataclassError:  # a type whose own defaults do not pass its own validation
        base = default(**changes)
    values = vars(base)
    fields = set(default.__dataclass_fields__)
    names = fields | {alias for alias, name in base.attribute_map.items() if name in fields}
    small = {name: value for name, value in SIZES.items() if name in names}
    if "kv_lora_rank" in names:  # latent attention shares one latent among as many key as query heads
        small["num_key_value_heads"] = small["num_attention_heads"]
    parts = {name: type(values[name]) for name in base.sub_configs if isinstance(values.get(name), PreTrainedConfig)}
    small |= {name: _shrunk(kind, changes.get(name, {})) for name, kind in parts.items()}
    count_name = base.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if count_name in fields:
        lists = {n: _distinct(v) for n in fields if isinstance(v := values.get(n), list) and len(v) == values[count_name]}
        lists = {name: kinds for name, kinds in lists.items() if len(kinds) <= MOST_KINDS}
        if "use_sliding_window" in fields and "layer_types" in fields:
            lists["layer_types"] = ["sliding_attention", "full_attention"]
        lists |= {name: value for name, value in changes.items() if name in lists}
        layers = changes.get(count_name, max(2, *map(len, lists.values()), 2))
        small[count_name] = layers
        small |= {name: (values * layers)[:layers] for name, values in lists.items()}
    if isinstance(rope := values.get("rope_parameters"), dict):
        small["rope_parameters"] = _early(rope)
    return small | {name: value for name, value in changes.items() if name not in parts}


def _distinct(values: list[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _early(rope: dict[str, Any]) -> dict[str, Any]:
    """Parameters of rotary positions, of all layers or by layer type, that were trained on `ORIGINAL` positions first."""
    inner = {name: _early(value) if isinstance(value, dict) else value for name, value in rope.items()}
    return inner | ({"original_max_position_embeddings": ORIGINAL} if "original_max_position_embeddings" in rope else {})
