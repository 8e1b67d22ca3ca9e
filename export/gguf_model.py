"""A transformers model from a GGUF: its configuration from the metadata, its weights from the tensors, nothing left over.

transformers has a reader of its own, which drops the metadata and the tensors that it does not know, position scaling among
them. Here each key has a fate (export/gguf_metadata.py) and each tensor a place (export/gguf_weights.py), or the file is
refused. What the configuration says is what llama.cpp's graph of the architecture (src/models in its source) computes:
tests/data/make_gguf_tokens.py recorded its tokens to compare with.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from export import gguf_file, gguf_weights
from export.checkpoint_files import AGAIN
from export.errors import ExportError, UnsupportedModel
from export.gguf_file import GgufFile
from export.gguf_metadata import Hyperparameters, check_text, refuse_strange
from export.gguf_weights import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, Places
from runtime.bundle import Task

Settings = dict[str, Any]
"""Arguments of a configuration class of transformers."""

_GEMMA2_27B, _GEMMA3_27B = 46, 62
"""Layers by which llama.cpp knows the two models whose queries are scaled by the hidden size per head."""
_AWAY = 1e29
"""What divides a frequency away."""
_SOFTMAX, _SIGMOID, _SOFTMAX_OF_CHOSEN = 1, 2, 3
"""`expert_gating_func`."""


@dataclass(frozen=True)
class Model:
    """What a GGUF's metadata comes to."""

    model_type: str
    """transformers' name of the architecture."""
    settings: Settings
    places: Places
    divide: bool = True
    """The frequencies of all layers are divided by `rope_freqs.weight`, where the file has it."""


def load(path: Path, task: Task, share: Callable[[float], None] = lambda share: None) -> PreTrainedModel:
    """The model in float32 with transformers' plain attention, whole.

    `share` is told how much of the tensors was read, from 0 to 1. Raises ExportError for a file that cannot be read or is not
    whole, UnsupportedModel for one that says what is not carried over.
    """
    file = gguf_file.read(path)
    try:
        model = interpret(file)
        config = CONFIG_MAPPING[model.model_type](**model.settings)
        loaded, info = _auto_class(config, task).from_pretrained(
            None,
            config=config,
            state_dict=gguf_weights.state_dict(file, model.places, config, share),
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except ExportError:
        raise
    except Exception as error:  # sizes that are nonsense or contradict each other, in whatever way that is found out
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"{path} could not be loaded: {said}; its metadata and its weights contradict each other") from error
    _check_loaded(file, loaded, info, task)
    if model.divide:
        _divide_frequencies(file, loaded)
    whole: PreTrainedModel = loaded
    return whole


def interpret(file: GgufFile) -> Model:
    """The configuration that the metadata of `file` describes. Raises UnsupportedModel for what has no place in it."""
    refuse_strange(file.metadata, file.path)
    check_text(file.keys, file.path)
    if file.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path} is of the architecture {file.architecture!r}, which is not read from a GGUF here: export the original"
            f" model's folder instead (read are {', '.join(sorted(ARCHITECTURES))})"
        )
    keys = Hyperparameters(file.architecture, file.metadata, file.path)
    model = ARCHITECTURES[file.architecture](file, keys)
    for tensor in (gguf_weights.ROPE & set(file.tensor_names)) - _ROPE_TENSORS.get(file.architecture, set()):
        raise keys.unsupported(f"holds {tensor}, which llama.cpp does not read for the architecture {file.architecture}")
    keys.refuse_rest()
    return model


def _auto_class(config: PreTrainedConfig, task: Task) -> Any:
    """The model class of `config`, with the head that `task` needs."""
    return (MODEL_FOR_CAUSAL_LM_MAPPING if task == "text-generation" else MODEL_MAPPING)[type(config)]


def _check_loaded(file: GgufFile, model: PreTrainedModel, info: Mapping[str, Any], task: Task) -> None:
    """Refuse weights that transformers made up, of another shape than the metadata says, or that the model did not take."""
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise ExportError(
            f"{file.path} contradicts itself: {name} has the shape {tuple(stored)}, by the metadata it is {tuple(wanted)};"
            " convert the model again"
        )
    if missing := info["missing_keys"]:
        raise ExportError(
            f"{file.path} lacks {len(missing)} of the weights that {type(model).__name__} has "
            f"({min(missing)}, for one); {AGAIN}"
        )
    unexpected = [name for name in info["unexpected_keys"] if task == "text-generation" or not name.startswith("lm_head.")]
    if unexpected:
        raise UnsupportedModel(
            f"{file.path} holds weights that a model of the architecture {file.architecture} has no place for"
            f" ({', '.join(sorted(unexpected)[:3])}): export the original model's folder instead"
        )


def _divide_frequencies(file: GgufFile, model: PreTrainedModel) -> None:
    """Divide the rotation's frequencies by `rope_freqs.weight`, as llama.cpp does before it scales them."""
    factors = file.tensor(ROPE_FREQS)
    if factors is None:
        return
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            frequencies = getattr(module, name, None)
            if isinstance(frequencies, torch.Tensor):
                if frequencies.shape != factors.shape:
                    raise ExportError(
                        f"{file.path} contradicts itself: {ROPE_FREQS} has {factors.numel()} numbers for {frequencies.numel()}"
                        " frequencies; convert the model again"
                    )
                setattr(module, name, frequencies / factors)


# What is common to all -----------------------------------------------------------------------------------------------------


def _common(file: GgufFile, keys: Hyperparameters, *, alike: bool = True) -> Settings:
    """What every decoder has: sizes, and the tokens that begin and end a text; the first layer's, where not all are `alike`."""
    heads = keys.whole("attention.head_count")
    layers = keys.whole("block_count")
    keys.compare("attention.causal", True)
    keys.value("pooling_type")
    embedding = next((t for reader in file.readers for t in reader.tensors if t.name == "token_embd.weight"), None)
    if embedding is None:
        raise ExportError(f"{file.path} lacks token_embd.weight; it is not a whole model: fetch it again")
    vocabulary = int(embedding.shape[-1])  # the reader's shape has the fastest dimension in front
    keys.value("vocab_size")
    if file.vocabulary not in (None, vocabulary):
        raise ExportError(
            f"{file.path} contradicts itself: it has embeddings for {vocabulary} tokens and a vocabulary of {file.vocabulary};"
            " convert the model again"
        )
    return {
        "vocab_size": vocabulary,
        "max_position_embeddings": keys.whole("context_length"),
        "hidden_size": keys.whole("embedding_length"),
        "intermediate_size": keys.whole("feed_forward_length") if alike else keys.layers("feed_forward_length", layers)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads) if alike else heads,
        "tie_word_embeddings": "output.weight" not in file.tensor_names,
        "bos_token_id": file.token_id("bos"),
        "eos_token_id": file.token_id("eos"),
        "pad_token_id": file.token_id("padding"),
    }


def _head_size(keys: Hyperparameters, settings: Settings, *, own: bool = True) -> int:
    """The size of a head; where the architecture's is not its `own`, it is compared with the hidden size per head."""
    even = settings["hidden_size"] // settings["num_attention_heads"]
    if not own:
        keys.compare("attention.key_length", even)
    size = keys.whole("attention.key_length", even)
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        keys.compare(key, size)
    return size


def _rms_epsilon(keys: Hyperparameters) -> float:
    keys.value("attention.layer_norm_epsilon")
    return keys.number("attention.layer_norm_rms_epsilon")


def _layer_epsilon(keys: Hyperparameters) -> float:
    keys.value("attention.layer_norm_rms_epsilon")
    return keys.number("attention.layer_norm_epsilon")


def _rotation(file: GgufFile, keys: Hyperparameters, settings: Settings, head: int, *, part: bool = False) -> Settings:
    """`rope_parameters`: how heads of the size `head` are turned, or only the `part` of them that the file says."""
    turned = keys.whole("rope.dimension_count", head) if part else head
    for key in ("rope.dimension_count", "rope.dimension_count_swa"):
        keys.compare(key, turned)
    rope: Settings = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    if part:
        share = turned / head
        rope["partial_rotary_factor"] = share if int(head * share) == turned else math.nextafter(share, 1.0)
    if keys.architecture != "gemma3":
        keys.compare("rope.freq_base_swa", rope["rope_theta"])
    return rope | _scaling(file, keys, settings)


def _scaling(file: GgufFile, keys: Hyperparameters, settings: Settings) -> Settings:
    """The part of `rope_parameters` that says how positions are scaled."""
    longrope = ROPE_LONG in file.tensor_names or ROPE_SHORT in file.tensor_names
    kind = keys.value("rope.scaling.type") or ("longrope" if longrope and keys.architecture == "phi3" else "linear")
    factor = keys.number("rope.scaling.factor", 0.0) or keys.number("rope.scale_linear", 0.0) or 1.0
    keys.value("rope.scale_linear")
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    original = keys.whole("rope.scaling.original_context_length", settings["max_position_embeddings"])
    keys.value("rope.scaling.finetuned")
    keys.compare("rope.scaling.yarn_beta_fast", 32.0)
    keys.compare("rope.scaling.yarn_beta_slow", 1.0)
    if kind == "yarn":
        scale = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0  # as get_mscale in llama.cpp's llama-context.cpp
        keys.compare("rope.scaling.yarn_ext_factor", 1.0, -1.0)
        keys.compare("rope.scaling.yarn_attn_factor", scale)
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": scale * attention,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        }
    keys.compare("rope.scaling.yarn_ext_factor", 0.0, -1.0)
    keys.compare("rope.scaling.yarn_attn_factor", 1.0)
    if kind == "longrope":
        keys.compare("rope.scaling.factor", 1.0, 0.0)
        return _longrope(file, keys, attention, original)
    if longrope or kind not in ("linear", "none"):
        raise keys.unsupported(f"scales its positions by the rule {kind!r} in a way that is not known here")
    keys.compare("rope.scaling.attn_factor", 1.0)
    return {"rope_type": "default"} if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": factor}


def _longrope(file: GgufFile, keys: Hyperparameters, attention: float, original: int) -> Settings:
    factors = {"long_factor": file.tensor(ROPE_LONG), "short_factor": file.tensor(ROPE_SHORT)}
    if ROPE_FREQS in file.tensor_names or any(values is None for values in factors.values()):
        raise keys.unsupported(f"scales its positions by longrope, but not with just {ROPE_LONG} and {ROPE_SHORT}")
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "attention_factor": attention,
        **{name: values.tolist() for name, values in factors.items() if values is not None},
    }


def _experts(keys: Hyperparameters, *, gating: int = _SOFTMAX, normalized: bool = True) -> tuple[int, int]:
    """How many experts there are, and how many a token uses."""
    keys.compare("expert_gating_func", gating)
    keys.compare("expert_weights_norm", normalized)
    return keys.whole("expert_count"), keys.whole("expert_used_count")


def _has(file: GgufFile, module: str) -> bool:
    """Whether the first layer has the tensor."""
    return f"blk.0.{module}" in file.tensor_names


# Architectures -------------------------------------------------------------------------------------------------------------


def _llama(file: GgufFile, keys: Hyperparameters) -> Model:
    """Llama and Mistral, and Mixtral where there are experts. llama.cpp turns neighbours: queries and keys are reordered."""
    settings = _common(file, keys)
    keys.compare("tensor_data_layout", "Meta AI original pth")
    head = settings["head_dim"] = _head_size(keys, settings)
    settings |= {"rms_norm_eps": _rms_epsilon(keys), "rope_parameters": _rotation(file, keys, settings, head)}
    if keys.value("expert_count"):
        experts, used = _experts(keys)
        settings |= {"num_local_experts": experts, "num_experts_per_tok": used, "sliding_window": None}
        return Model("mixtral", settings, gguf_weights.MIXTRAL)
    settings |= {"attention_bias": _has(file, "attn_q.bias"), "mlp_bias": _has(file, "ffn_up.bias")}
    return Model("llama", settings, gguf_weights.LLAMA)


def _granite(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _common(file, keys)
    head = _head_size(keys, settings, own=False)
    keys.compare("rope.scaling.finetuned", True)
    settings |= {
        "rms_norm_eps": _rms_epsilon(keys),
        "rope_parameters": _rotation(file, keys, settings, head),
        "attention_bias": _has(file, "attn_q.bias"),
        "mlp_bias": _has(file, "ffn_up.bias"),
        "embedding_multiplier": keys.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": keys.number("residual_scale", 0.0) or 1.0,
        "attention_multiplier": keys.number("attention.scale", 0.0) or head**-0.5,
        "logits_scaling": keys.number("logit_scale"),
    }
    return Model("granite", settings, gguf_weights.LLAMA)


def _qwen2(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _common(file, keys)
    head = _head_size(keys, settings, own=False)
    settings |= {"rms_norm_eps": _rms_epsilon(keys), "rope_parameters": _rotation(file, keys, settings, head)}
    return Model("qwen2", settings | {"use_sliding_window": False}, gguf_weights.DENSE)


def _qwen3(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _common(file, keys)
    head = settings["head_dim"] = _head_size(keys, settings)
    settings |= {"rms_norm_eps": _rms_epsilon(keys), "rope_parameters": _rotation(file, keys, settings, head)}
    return Model("qwen3", settings | {"use_sliding_window": False}, gguf_weights.DENSE | gguf_weights.QK_NORMS)


def _qwen2moe(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _common(file, keys)
    head = _head_size(keys, settings, own=False)
    experts, used = _experts(keys, normalized=False)
    settings |= {
        "rms_norm_eps": _rms_epsilon(keys),
        "rope_parameters": _rotation(file, keys, settings, head),
        "use_sliding_window": False,
        "num_experts": experts,
        "num_experts_per_tok": used,
        "norm_topk_prob": False,
        "moe_intermediate_size": keys.whole("expert_feed_forward_length", 0) or settings["intermediate_size"] // used,
        "shared_expert_intermediate_size": keys.whole("expert_shared_feed_forward_length", 0) or settings["intermediate_size"],
    }
    return Model("qwen2_moe", settings, gguf_weights.QWEN2MOE)


def _qwen3moe(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _common(file, keys)
    head = settings["head_dim"] = _head_size(keys, settings)
    experts, used = _experts(keys)
    settings |= {
        "rms_norm_eps": _rms_epsilon(keys),
        "rope_parameters": _rotation(file, keys, settings, head),
        "use_sliding_window": False,
        "num_experts": experts,
        "num_experts_per_tok": used,
        "norm_topk_prob": True,
        "moe_intermediate_size": keys.whole("expert_feed_forward_length", 0) or settings["intermediate_size"] // used,
    }
    return Model("qwen3_moe", settings, gguf_weights.QWEN3MOE)


def _minimax_m2(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _common(file, keys)
    head = settings["head_dim"] = _head_size(keys, settings)
    experts, used = _experts(keys, gating=_SIGMOID)
    if "expert_gating_func" not in keys:
        raise keys.unsupported("does not say minimax-m2.expert_gating_func")
    keys.compare("expert_feed_forward_length", settings["intermediate_size"])
    settings |= {
        "rms_norm_eps": _rms_epsilon(keys),
        "rope_parameters": _rotation(file, keys, settings, head, part=True),
        "num_local_experts": experts,
        "num_experts_per_tok": used,
    }
    return Model("minimax_m2", settings, gguf_weights.MINIMAX_M2)


def _gpt_oss(file: GgufFile, keys: Hyperparameters) -> Model:
    """llama.cpp rounds yarn's range to whole dimensions, as transformers does unless told otherwise."""
    settings = _common(file, keys)
    head = settings["head_dim"] = _head_size(keys, settings)
    experts, used = _experts(keys, gating=_SOFTMAX_OF_CHOSEN)
    settings |= {
        "rms_norm_eps": _rms_epsilon(keys),
        "rope_parameters": _rotation(file, keys, settings, head),
        "intermediate_size": keys.whole("expert_feed_forward_length"),
        "num_local_experts": experts,
        "num_experts_per_tok": used,
        "sliding_window": keys.whole("attention.sliding_window"),
        "layer_types": _layer_types(keys, settings["num_hidden_layers"], 2),
    }
    return Model("gpt_oss", settings, gguf_weights.GPT_OSS)


def _phi3(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _common(file, keys)
    head = _head_size(keys, settings, own=False)
    rope = _rotation(file, keys, settings, head, part=True)
    settings |= {
        "rms_norm_eps": _rms_epsilon(keys),
        "rope_parameters": rope,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", settings["max_position_embeddings"]),
        "sliding_window": keys.whole("attention.sliding_window", 0) or None,
    }
    return Model("phi3", settings, gguf_weights.PHI3)


def _layer_types(keys: Hyperparameters, layers: int, every: int) -> list[str]:
    """Which layers slide: the list of the file, or all but the last of `every` so many."""
    pattern = keys.value("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        sliding = [bool(layer) for layer in pattern[:layers]]
    else:
        every = every if pattern is None else keys.whole("attention.sliding_window_pattern")
        sliding = [every == 0 or layer % every < every - 1 for layer in range(layers)]
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def _gemma_common(file: GgufFile, keys: Hyperparameters, big: int | None) -> Settings:
    settings = _common(file, keys)
    head = settings["head_dim"] = _head_size(keys, settings)
    even = settings["hidden_size"] // settings["num_attention_heads"]
    settings["rms_norm_eps"] = _rms_epsilon(keys)
    settings["rope_parameters"] = _rotation(file, keys, settings, head)
    if big is not None:
        settings["query_pre_attn_scalar"] = even if settings["num_hidden_layers"] == big else head
    return settings


def _gemma(file: GgufFile, keys: Hyperparameters) -> Model:
    return Model("gemma", _gemma_common(file, keys, None), gguf_weights.GEMMA)


def _gemma2(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _gemma_common(file, keys, _GEMMA2_27B) | {
        "sliding_window": keys.whole("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }
    settings["layer_types"] = _layer_types(keys, settings["num_hidden_layers"], 2)
    return Model("gemma2", settings, gguf_weights.GEMMA2)


def _gemma3(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _gemma_common(file, keys, _GEMMA3_27B)
    window = keys.whole("attention.sliding_window", 0)
    layers = settings["num_hidden_layers"]
    types = _layer_types(keys, layers, 6) if window else ["full_attention"] * layers
    full = settings["rope_parameters"]
    if "sliding_attention" in types and full["rope_type"] not in ("default", "linear"):
        raise keys.unsupported(f"scales the positions of full and sliding layers by the rule {full['rope_type']!r}")
    sliding = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    settings |= {
        "layer_types": types,
        "sliding_window": window or None,
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
    }
    return Model("gemma3_text", settings, gguf_weights.GEMMA3)


def _gemma4(file: GgufFile, keys: Hyperparameters) -> Model:
    """Full layers have heads of another size and number, and turn a part of them: `rope_freqs.weight` divides the rest away."""
    settings = _common(file, keys, alike=False)
    layers = settings["num_hidden_layers"]
    if "attention.sliding_window_pattern" not in keys:
        raise keys.unsupported("does not say gemma4.attention.sliding_window_pattern")
    types = _layer_types(keys, layers, 1)
    shared = keys.whole("attention.shared_kv_layers", 0)
    full_head, sliding_head = keys.whole("attention.key_length"), keys.whole("attention.key_length_swa")
    keys.compare("attention.value_length", full_head)
    keys.compare("attention.value_length_swa", sliding_head)
    heads = dict(zip(types, keys.layers("attention.head_count_kv", layers), strict=True))
    if [heads[kind] for kind in types] != keys.layers("attention.head_count_kv", layers) or types[-1] != "full_attention":
        raise keys.unsupported("has layers of kinds that no gemma4 has")
    wide = [2 if layer >= layers - shared else 1 for layer in range(layers)]
    feed = keys.layers("feed_forward_length", layers)
    if feed not in ([feed[0]] * layers, [feed[0] * times for times in wide]):
        raise keys.unsupported(f"has gemma4.feed_forward_length = {feed}, which is not that of any gemma4")
    full = next(layer for layer, kind in enumerate(types) if kind == "full_attention")
    of_layers = keys.whole("embedding_length_per_layer_input", 0)
    settings |= {
        "head_dim": sliding_head,
        "num_key_value_heads": heads.get("sliding_attention", heads["full_attention"]),
        "per_layer_config": {
            layer: {"head_dim": full_head, "num_key_value_heads": heads["full_attention"]}
            for layer, kind in enumerate(types)
            if kind == "full_attention"
        },
        "layer_types": types,
        "rms_norm_eps": _rms_epsilon(keys),
        "rope_parameters": _gemma4_rotation(file, keys, settings, full_head, sliding_head),
        "sliding_window": keys.whole("attention.sliding_window"),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in file.tensor_names,
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": feed[0] != feed[-1],
        "hidden_size_per_layer_input": of_layers,
        "vocab_size_per_layer_input": settings["vocab_size"],
    }
    return Model("gemma4_text", settings, gguf_weights.GEMMA4, divide=False)


def _gemma4_rotation(file: GgufFile, keys: Hyperparameters, settings: Settings, full: int, sliding: int) -> Settings:
    keys.compare("rope.dimension_count", full)
    keys.compare("rope.dimension_count_swa", sliding)
    if _scaling(file, keys, settings) != {"rope_type": "default"}:
        raise keys.unsupported("scales the positions of a gemma4")
    factors = file.tensor(ROPE_FREQS)
    turned = full // 2 if factors is None else int((factors == 1).sum())
    if factors is not None and not bool((factors[:turned] == 1).all() and (factors[turned:] >= _AWAY).all()):
        raise keys.unsupported(f"divides frequencies by a {ROPE_FREQS} that is not that of any gemma4")
    return {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": keys.number("rope.freq_base", 10000.0),
            "partial_rotary_factor": 2 * turned / full,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)},
    }


def _starcoder2(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _common(file, keys)
    head = _head_size(keys, settings, own=False)
    settings |= {
        "norm_epsilon": _layer_epsilon(keys),
        "rope_parameters": _rotation(file, keys, settings, head),
        "sliding_window": None,
        "use_bias": True,
    }
    return Model("starcoder2", settings, gguf_weights.STARCODER2)


def _stablelm(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _common(file, keys)
    head = _head_size(keys, settings, own=False)
    parallel = not _has(file, "ffn_norm.weight")
    keys.value("use_parallel_residual")
    settings |= {
        "layer_norm_eps": _layer_epsilon(keys),
        "rope_parameters": _rotation(file, keys, settings, head, part=True),
        "use_parallel_residual": parallel,
        "use_qkv_bias": _has(file, "attn_q.bias"),
        "qk_layernorm": _has(file, "attn_q_norm.weight"),
    }
    return Model("stablelm", settings, gguf_weights.STABLELM)


def _nemotron(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _common(file, keys)
    head = settings["head_dim"] = _head_size(keys, settings, own=False)
    settings |= {
        "norm_eps": _layer_epsilon(keys),
        "rope_parameters": _rotation(file, keys, settings, head, part=True),
        "attention_bias": _has(file, "attn_q.bias"),
        "mlp_bias": _has(file, "ffn_up.bias"),
    }
    return Model("nemotron", settings, gguf_weights.NEMOTRON)


def _gpt2(file: GgufFile, keys: Hyperparameters) -> Model:
    common = _common(file, keys)
    _head_size(keys, common, own=False)
    keys.compare("attention.head_count_kv", common["num_attention_heads"])
    settings = {
        name: common[name] for name in ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    settings |= {
        "n_positions": common["max_position_embeddings"],
        "n_embd": common["hidden_size"],
        "n_layer": common["num_hidden_layers"],
        "n_head": common["num_attention_heads"],
        "n_inner": common["intermediate_size"],
        "layer_norm_epsilon": _layer_epsilon(keys),
    }
    return Model("gpt2", settings, gguf_weights.GPT2)


def _bloom(file: GgufFile, keys: Hyperparameters) -> Model:
    settings = _common(file, keys)
    _head_size(keys, settings, own=False)
    keys.compare("attention.head_count_kv", settings["num_attention_heads"])
    keys.compare("feed_forward_length", 4 * settings["hidden_size"])
    settings["layer_norm_epsilon"] = _layer_epsilon(keys)
    return Model("bloom", settings, gguf_weights.BLOOM)


def _falcon(file: GgufFile, keys: Hyperparameters) -> Model:
    """Falcon 7B has one key head and one norm a layer, 40B groups and two norms, 11B groups and one norm."""
    settings = _common(file, keys)
    head = _head_size(keys, settings, own=False)
    keys.compare("tensor_data_layout", "jploski")
    two_norms = _has(file, "attn_norm_2.weight")
    new = two_norms or settings["num_key_value_heads"] > 1
    settings |= {
        "layer_norm_epsilon": _layer_epsilon(keys),
        "rope_parameters": _rotation(file, keys, settings, head),
        "ffn_hidden_size": settings["intermediate_size"],
        "num_kv_heads": settings["num_key_value_heads"],
        "new_decoder_architecture": new,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if new else None,
    }
    return Model("falcon", settings, gguf_weights.FALCON_NEW if two_norms else gguf_weights.FALCON)


ARCHITECTURES: dict[str, Callable[[GgufFile, Hyperparameters], Model]] = {
    "bloom": _bloom,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gpt-oss": _gpt_oss,
    "gpt2": _gpt2,
    "granite": _granite,
    "llama": _llama,
    "minimax-m2": _minimax_m2,
    "nemotron": _nemotron,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}
"""By `general.architecture`."""
_ROPE_TENSORS = {
    "gemma4": {ROPE_FREQS},
    "granite": gguf_weights.ROPE,
    "llama": gguf_weights.ROPE,
    "phi3": {ROPE_LONG, ROPE_SHORT},
}
"""The tensors that llama.cpp divides the rotation's frequencies by, where it reads them."""
