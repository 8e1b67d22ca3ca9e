"""What becomes of every metadata key that llama.cpp writes into a GGUF; docs/gguf.md is made from this table.

A key of the architecture's namespace has one of four fates, and there is no fifth: it is carried into the configuration,
compared with what the model computes, known to change no number, or refused with its name. A key that nobody here has heard of
is refused too, as it may change every number of the model. So is one of the tokenizer's, as it may change every text.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gguf.constants import Keys

from export.errors import UnsupportedModel
from export.gguf_file import TEXT, Value

Kind = Literal["carried", "compared", "no effect", "noted", "parts", "refused"]


@dataclass(frozen=True)
class Fate:
    """What becomes of a key."""

    kind: Kind
    note: str
    """For the reader of docs/gguf.md."""
    neutral: tuple[Value, ...] = ()
    """Values with which the key says nothing, so that an architecture that does not know it may have it."""


_SLIDING = "gemma2, gemma3, gemma4, gpt-oss"
ARCHITECTURE: dict[str, Fate] = {
    "vocab_size": Fate("no effect", "the rows of `token_embd.weight` decide; there have to be as many tokens"),
    "context_length": Fate("carried", "`max_position_embeddings`"),
    "embedding_length": Fate("carried", "`hidden_size`"),
    "embedding_length_out": Fate("refused", "another width of the output"),
    "features_length": Fate("refused", "audio codecs"),
    "block_count": Fate("carried", "`num_hidden_layers`"),
    "leading_dense_block_count": Fate("refused", "experts in some layers only", (0,)),
    "feed_forward_length": Fate("carried", "`intermediate_size`; one number for all layers, but in gemma4"),
    "expert_feed_forward_length": Fate("carried", "`moe_intermediate_size`; one number for all layers", (0,)),
    "expert_shared_feed_forward_length": Fate("carried", "`shared_expert_intermediate_size`", (0,)),
    "expert_chunk_feed_forward_length": Fate("refused", "grouped experts", (0,)),
    "use_parallel_residual": Fate("no effect", "the blocks are parallel where they have no `ffn_norm` (stablelm)"),
    "tensor_data_layout": Fate("compared", "with the one layout that the architecture's converter writes"),
    "expert_count": Fate("carried", "`num_experts`, `num_local_experts`", (0,)),
    "expert_used_count": Fate("carried", "`num_experts_per_tok`; one number for all layers", (0,)),
    "expert_shared_count": Fate("refused", "several shared experts", (0,)),
    "expert_group_count": Fate("refused", "experts in groups", (0, 1)),
    "expert_group_used_count": Fate("refused", "experts in groups", (0, 1)),
    "expert_weights_scale": Fate("refused", "a scale of the experts' sum", (0.0, 1.0)),
    "expert_weights_norm": Fate("compared", "with what the architecture does: qwen2moe does not normalize, the others do"),
    "expert_gating_func": Fate(
        "compared",
        "with what the architecture does: 2 (sigmoid) for minimax-m2, 3 (softmax of the experts chosen) for gpt-oss, "
        "1 (softmax) for others",
        (0,),
    ),
    "expert_group_scale": Fate("refused", "experts in groups", (0.0, 1.0)),
    "experts_per_group": Fate("refused", "experts in groups", (0,)),
    "moe_every_n_layers": Fate("refused", "experts in some layers only", (0, 1)),
    "moe_latent_size": Fate("refused", "experts of another width", (0,)),
    "nextn_predict_layers": Fate("refused", "layers that predict further tokens", (0,)),
    "n_deepstack_layers": Fate("refused", "layers that take images", (0,)),
    "pooling_type": Fate("no effect", "tokens are not pooled; for embeddings see `--pooling`"),
    "logit_scale": Fate("carried", "`logits_scaling` (granite)", (0.0, 1.0)),
    "decoder_start_token_id": Fate("refused", "encoders with a decoder"),
    "decoder_block_count": Fate("refused", "encoders with a decoder"),
    "attn_logit_softcapping": Fate("carried", "`attn_logit_softcapping` (gemma2; 50 where it is not said)", (0.0,)),
    "router_logit_softcapping": Fate("refused", "soft caps in the router", (0.0,)),
    "final_logit_softcapping": Fate(
        "carried", "`final_logit_softcapping` (gemma2, gemma3, gemma4; 30 in gemma2 where it is not said)", (0.0,)
    ),
    "swin_norm": Fate("refused", "norms of chameleon", (False,)),
    "rescale_every_n_layers": Fate("refused", "recurrent layers", (0,)),
    "time_mix_extra_dim": Fate("refused", "recurrent layers", (0,)),
    "time_decay_extra_dim": Fate("refused", "recurrent layers", (0,)),
    "residual_scale": Fate("carried", "`residual_multiplier` (granite)", (0.0, 1.0)),
    "embedding_scale": Fate("carried", "`embedding_multiplier` (granite)", (0.0, 1.0)),
    "token_shift_count": Fate("refused", "recurrent layers", (0,)),
    "interleave_moe_layer_step": Fate("refused", "experts in some layers only", (0, 1)),
    "full_attention_interval": Fate("refused", "recurrent layers", (0, 1)),
    "activation_sparsity_scale": Fate("refused", "gemma3n"),
    "altup.active_idx": Fate("refused", "gemma3n"),
    "altup.num_inputs": Fate("refused", "gemma3n"),
    "embedding_length_per_layer_input": Fate("carried", "`hidden_size_per_layer_input` (gemma4)", (0,)),
    "swiglu_clamp_exp": Fate("refused", "clamped experts", (0.0,)),
    "swiglu_clamp_shexp": Fate("refused", "clamped experts", (0.0,)),
    "{dense}_feat_in": Fate("refused", "dense layers behind the model"),
    "{dense}_feat_out": Fate("refused", "dense layers behind the model"),
    "attention.head_count": Fate("carried", "`num_attention_heads`; one number for all layers"),
    "attention.head_count_kv": Fate(
        "carried", "`num_key_value_heads`, `head_count` where it is not said; one number for all layers"
    ),
    "attention.max_alibi_bias": Fate("refused", "ALiBi of another slope", (0.0,)),
    "attention.clamp_kqv": Fate("refused", "clamped queries, keys and values", (0.0,)),
    "attention.key_length": Fate(
        "carried",
        "`head_dim`, `embedding_length / head_count` where it is not said; compared where the architecture has no other",
    ),
    "attention.value_length": Fate("compared", "with `attention.key_length`"),
    "attention.layer_norm_epsilon": Fate("carried", "the layer norms' epsilon; no effect where the norms are RMS norms"),
    "attention.layer_norm_rms_epsilon": Fate("carried", "the RMS norms' epsilon; no effect where the norms are layer norms"),
    "attention.group_norm_epsilon": Fate("refused", "group norms"),
    "attention.group_norm_groups": Fate("refused", "group norms"),
    "attention.causal": Fate("compared", "with true"),
    "attention.q_lora_rank": Fate("refused", "latent attention", (0,)),
    "attention.kv_lora_rank": Fate("refused", "latent attention", (0,)),
    "attention.decay_lora_rank": Fate("refused", "recurrent layers", (0,)),
    "attention.iclr_lora_rank": Fate("refused", "recurrent layers", (0,)),
    "attention.value_residual_mix_lora_rank": Fate("refused", "recurrent layers", (0,)),
    "attention.gate_lora_rank": Fate("refused", "recurrent layers", (0,)),
    "attention.relative_buckets_count": Fate("refused", "relative positions", (0,)),
    "attention.sliding_window": Fate(
        "carried",
        f"`sliding_window` ({_SLIDING}, phi3). llama.cpp leaves phi3's out, and warns that its answers suffer; here it is as"
        " the model's authors have it",
        (0,),
    ),
    "attention.scale": Fate("carried", "`attention_multiplier` (granite)", (0.0,)),
    "attention.output_scale": Fate("refused", "a scale of the attention's output", (0.0, 1.0)),
    "attention.temperature_length": Fate("refused", "attention that depends on the position", (0,)),
    "attention.temperature_scale": Fate("refused", "attention that depends on the position", (0.0,)),
    "attention.key_length_mla": Fate("refused", "latent attention", (0,)),
    "attention.value_length_mla": Fate("refused", "latent attention", (0,)),
    "attention.key_length_swa": Fate(
        "carried", "`head_dim` of gemma4's sliding layers; others: compared with `attention.key_length`"
    ),
    "attention.value_length_swa": Fate("compared", "with `attention.key_length_swa`"),
    "attention.shared_kv_layers": Fate("carried", "`num_kv_shared_layers` (gemma4)", (0,)),
    "attention.sliding_window_pattern": Fate(
        "carried", f"`layer_types` ({_SLIDING}): every n-th layer is full, or a list", (0, 1)
    ),
    "attention.indexer.head_count": Fate("refused", "sparse attention", (0,)),
    "attention.indexer.key_length": Fate("refused", "sparse attention", (0,)),
    "attention.indexer.top_k": Fate("refused", "sparse attention", (0,)),
    "rope.dimension_count": Fate("carried", "`partial_rotary_factor`; compared with the head's size where all of it turns"),
    "rope.dimension_count_swa": Fate("compared", "with `rope.dimension_count`"),
    "rope.dimension_sections": Fate("refused", "positions of several axes"),
    "rope.freq_base": Fate("carried", "`rope_theta`; 10000 where it is not said"),
    "rope.freq_base_swa": Fate(
        "carried", "`rope_theta` of the sliding layers of gemma3 and gemma4 (10000 where it is not said); others: compared"
    ),
    "rope.scale_linear": Fate("carried", "the old name of `rope.scaling.factor`"),
    "rope.scaling.type": Fate("carried", "`rope_type`: none, linear, yarn, longrope; linear where it is not said"),
    "rope.scaling.factor": Fate("carried", "`factor`"),
    "rope.scaling.alpha": Fate("refused", "hunyuan's scaling", (0.0,)),
    "rope.scaling.attn_factor": Fate("carried", "`attention_factor` (yarn, longrope); compared with 1 where nothing is scaled"),
    "rope.scaling.original_context_length": Fate("carried", "`original_max_position_embeddings` (yarn, longrope)"),
    "rope.scaling.finetuned": Fate(
        "no effect", "llama.cpp prints it; in granite, where false means no rotation, compared with true"
    ),
    "rope.scaling.yarn_log_multiplier": Fate("refused", "yarn with a second scale", (0.0,)),
    "rope.scaling.yarn_ext_factor": Fate("compared", "with 1 under yarn; llama.cpp reads it for grok alone"),
    "rope.scaling.yarn_attn_factor": Fate(
        "compared", "with the 0.1 ln(factor) + 1 that llama.cpp computes in its place, under yarn"
    ),
    "rope.scaling.yarn_beta_fast": Fate("compared", "with 32, which llama.cpp computes with whatever is said"),
    "rope.scaling.yarn_beta_slow": Fate("compared", "with 1, which llama.cpp computes with whatever is said"),
    "ssm.conv_kernel": Fate("refused", "recurrent layers"),
    "ssm.inner_size": Fate("refused", "recurrent layers"),
    "ssm.state_size": Fate("refused", "recurrent layers"),
    "ssm.time_step_rank": Fate("refused", "recurrent layers"),
    "ssm.group_count": Fate("refused", "recurrent layers"),
    "ssm.dt_b_c_rms": Fate("refused", "recurrent layers"),
    "kda.head_dim": Fate("refused", "recurrent layers"),
    "wkv.head_size": Fate("refused", "recurrent layers"),
    "posnet.embedding_length": Fate("refused", "audio codecs"),
    "posnet.block_count": Fate("refused", "audio codecs"),
    "convnext.embedding_length": Fate("refused", "audio codecs"),
    "convnext.block_count": Fate("refused", "audio codecs"),
    "classifier.output_labels": Fate("refused", "classifiers"),
    "shortconv.l_cache": Fate("refused", "convolutional layers"),
}
"""The keys after the architecture's name and a dot."""

_INFILL = Fate("no effect", "infilling, which is not offered")
_TEMPLATE = "chat_template."
TOKENIZER: dict[str, Fate] = {
    "ggml.model": Fate("carried", "`gpt2` (bytes), `llama` (SentencePiece) and `gemma4` are read; others are refused"),
    "ggml.pre": Fate("carried", "how `gpt2` splits text, by the names in export/splits.py; others are refused"),
    "ggml.tokens": Fate("carried", "the vocabulary"),
    "ggml.token_type": Fate("carried", "which tokens are found whole, and which of them are no text"),
    "ggml.token_type_count": Fate("no effect", "the segments of encoders"),
    "ggml.scores": Fate("carried", "the order in which `llama` merges; gemma's have that of the vocabulary"),
    "ggml.merges": Fate("carried", "in `gpt2` and `gemma4`; `llama` merges by its scores, as in llama.cpp"),
    "ggml.bos_token_id": Fate("carried", "begins a text; 1 in `llama` where it is not said"),
    "ggml.eos_token_id": Fate("carried", "ends an answer; 2 in `llama` where it is not said"),
    "ggml.eos_token_ids": Fate("carried", "end an answer, too (Ollama writes them)"),
    "ggml.eot_token_id": Fate("carried", "ends an answer, too"),
    "ggml.eom_token_id": Fate("carried", "ends an answer, too"),
    "ggml.unknown_token_id": Fate("carried", "`unk_token` of chat templates; 0 in `llama` where it is not said"),
    "ggml.seperator_token_id": Fate("carried", "`sep_token` of chat templates"),
    "ggml.padding_token_id": Fate("carried", "`pad_token` of chat templates"),
    "ggml.cls_token_id": Fate("carried", "`cls_token` of chat templates"),
    "ggml.mask_token_id": Fate("carried", "`mask_token` of chat templates"),
    "ggml.add_bos_token": Fate(
        "carried",
        "a text begins with BOS; where it is not said, it does in `llama` and by some rules of `ggml.pre`. In `gemma4` it does"
        " whatever is said, as in llama.cpp",
    ),
    "ggml.add_eos_token": Fate("carried", "a text ends with EOS"),
    **{
        f"ggml.add_{name}_token": Fate("no effect", "Ollama writes it, and nothing reads it")
        for name in ("unknown", "seperator", "padding", "cls", "mask")
    },
    "ggml.add_sep_token": Fate("refused", "the end of a text of encoders", (False,)),
    "ggml.add_space_prefix": Fate(
        "carried",
        "a blank in front of a text, and behind each token that is found whole, in `llama`; it is there where it is not said."
        " Others have none, whatever is said, as in llama.cpp",
    ),
    "ggml.normalizer.lowercase": Fate("refused", "the normalization of encoders' vocabularies", (False,)),
    "ggml.normalizer.strip_accents": Fate("refused", "the normalization of encoders' vocabularies", (False,)),
    "ggml.remove_extra_whitespaces": Fate("no effect", "llama.cpp reads it for t5's vocabularies alone"),
    "ggml.precompiled_charsmap": Fate("refused", "the normalization of t5's vocabularies"),
    "ggml.suppress_tokens": Fate("noted", "tokens that are never to be drawn; they are not left out of an answer here"),
    "huggingface.json": Fate("no effect", "llama.cpp does not read it"),
    "rwkv.world": Fate("refused", "the vocabulary of rwkv"),
    "chat_template": Fate("carried", "the chat template `default`"),
    _TEMPLATE + "{name}": Fate("carried", "the chat template of that name"),
    "chat_templates": Fate("no effect", "the names of the others"),
    **{f"ggml.fim_{name}_token_id": _INFILL for name in ("pre", "suf", "mid", "pad", "rep", "sep")},
    **{f"ggml.{name}_token_id": _INFILL for name in ("prefix", "suffix", "middle")},
}
"""The keys after `tokenizer.`, which export/gguf_tokenizer.py carries; llama.cpp reads them in src/llama-vocab.cpp."""

OTHERS: dict[str, Fate] = {
    "general.architecture": Fate("carried", "the model's class; see the architectures above"),
    "general.type": Fate("compared", "with `model`: adapters, projectors and the like are refused"),
    "general.alignment": Fate("no effect", "where the tensors begin, for the reader of the file"),
    "general.*": Fate("no effect", "names, authors, links, licences, recommended sampling"),
    "tokenizer.*": Fate("refused", "other keys of the tokenizer, as they may change its tokens"),
    "split.*": Fate("parts", "compared with the names of the files"),
    "adapter.*": Fate("refused", "an adapter is not a model"),
    "imatrix.*": Fate("refused", "statistics for a quantization are no model"),
    "clip.*": Fate("refused", "the projector of a model that sees or hears"),
    "diffusion.*": Fate("refused", "models that do not answer from left to right"),
    "xielu.*": Fate("refused", "activations of apertus"),
    "*": Fate("no effect", "other namespaces (`quantize.imatrix.file`, for one), which llama.cpp does not read"),
}
"""The keys outside the architecture's namespace."""


def written() -> tuple[str, ...]:
    """Every key that the `gguf` package can write, as `{arch}.block_count`, in its order."""

    def collect(holder: type) -> list[str]:
        found: list[str] = []
        for name, value in vars(holder).items():
            if isinstance(value, str) and not name.startswith("_"):
                found.append(value)
            elif isinstance(value, type):
                found += collect(value)
        return found

    return tuple(dict.fromkeys(collect(Keys)))


def fate(key: str) -> Fate | None:
    """What becomes of `key`, written with `{arch}`; None for one that the table lacks."""
    if key.startswith("{arch}."):
        return ARCHITECTURE.get(key.removeprefix("{arch}."))
    if key.startswith(TEXT):
        return _of_text(key)
    return OTHERS.get(key) or OTHERS.get(key.partition(".")[0] + ".*")


def refuse_strange(metadata: Mapping[str, Value], where: Path) -> None:
    """Refuse a file whose keys say that it is something else than a language model. Raises UnsupportedModel."""
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModel(f"{where} is not a model but of the type {kind!r} (general.type); give the model's own GGUF")
    for key in metadata:
        known = OTHERS.get(key.partition(".")[0] + ".*")
        if known is not None and known.kind == "refused":
            raise UnsupportedModel(
                f"{where} has the key {key} ({known.note}); give the model's own GGUF, or its original folder"
            )


def check_text(keys: Mapping[str, Value], where: Path) -> tuple[str, ...]:
    """Notes on the tokenizer's keys that are left out; raises UnsupportedModel for one that may change its tokens."""
    notes = []
    for key, said in keys.items():
        if not key.startswith(TEXT):
            continue
        known = _of_text(key)
        if known is None:
            raise UnsupportedModel(
                f"{where} has the key {key}, which is not known here and may change how text becomes tokens: export the "
                "original model's folder instead"
            )
        if known.kind == "refused" and not any(_same(said, value) for value in known.neutral):
            raise UnsupportedModel(
                f"{where} has the key {key} ({known.note}), which is not carried over: export the original model's folder"
                " instead"
            )
        if known.kind == "noted":
            notes.append(f"{key} of {where.name} is left out: {known.note}")
    return tuple(notes)


def _of_text(key: str) -> Fate | None:
    name = key.removeprefix(TEXT)
    return TOKENIZER.get(_TEMPLATE + "{name}" if name.startswith(_TEMPLATE) else name)


class Hyperparameters:
    """The keys of a GGUF's architecture; each has to be taken by whoever makes the model's configuration of it."""

    def __init__(self, architecture: str, metadata: Mapping[str, Value], where: Path) -> None:
        self.architecture = architecture
        self.where = where
        begin = f"{architecture}."
        self._values = {key.removeprefix(begin): value for key, value in metadata.items() if key.startswith(begin)}
        self._left = dict(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def value(self, key: str) -> Value | None:
        """What the file says under `key`, which counts as taken; None where it says nothing."""
        self._left.pop(key, None)
        return self._values.get(key)

    def number(self, key: str, default: float | None = None) -> float:
        """One number: `default` where the file says none. An array's one number, where it is the same in all layers.

        Raises UnsupportedModel for layers that differ, and where the file says nothing and there is no default.
        """
        said = self.value(key)
        if isinstance(said, list) and said and all(value == said[0] for value in said):
            said = said[0]
        if said is None:
            said = default
        if isinstance(said, bool | int | float):
            return said
        if said is None:
            raise self.unsupported(f"does not say {self.architecture}.{key}, without which it is not a whole model")
        raise self.unsupported(f"has {self._told(key)}; layers that differ in it are not carried over")

    def whole(self, key: str, default: int | None = None) -> int:
        """One number without a fraction."""
        return int(self.number(key, default))

    def layers(self, key: str, count: int) -> list[int]:
        """A whole number for each of `count` layers, the same for all where the file says one."""
        said = self.value(key)
        if isinstance(said, list) and len(said) == count and all(isinstance(value, int) for value in said):
            return [int(value) for value in said]
        return [self.whole(key)] * count

    def compare(self, key: str, *computed: Value) -> None:
        """Refuse a value of `key` other than those that the model computes with. A key that is not there passes."""
        said = self.value(key)
        if isinstance(said, list) and said and all(value == said[0] for value in said):
            said = said[0]
        if said is not None and not any(_same(said, value) for value in computed):
            raise self.unsupported(
                f"has {self._told(key)} where the model computes with {computed[0]}; its tokens would be wrong"
            )

    def refuse_rest(self) -> None:
        """Refuse the file for a key that nobody took, unless its value says nothing. Raises UnsupportedModel."""
        for key, said in self._left.items():
            known = ARCHITECTURE.get(_FEATURES.sub("{dense}_feat", key))
            said = said[0] if isinstance(said, list) and said and all(value == said[0] for value in said) else said
            if known is None:
                raise self.unsupported(f"has {self._told(key)}, a key that is not known here and may change its tokens")
            if known.kind != "no effect" and not any(_same(said, value) for value in known.neutral):
                raise self.unsupported(
                    f"has {self._told(key)}, which is not carried into a model of this architecture; its tokens would be wrong"
                )

    def unsupported(self, why: str) -> UnsupportedModel:
        """The error that says what the file has, and what to do instead."""
        return UnsupportedModel(f"{self.where} {why}: export the original model's folder instead")

    def _told(self, key: str) -> str:
        said = str(self._values[key])
        return f"{self.architecture}.{key} = {said if len(said) <= 60 else said[:57] + '...'}"


_FEATURES = re.compile(r"dense_\d+_feat")


def _same(said: Value, value: Value) -> bool:
    """Whether two values are the same number, to the rounding of float32, or the same text."""
    if isinstance(said, int | float) and isinstance(value, int | float):
        return math.isclose(said, value, rel_tol=1e-6)
    return said == value
