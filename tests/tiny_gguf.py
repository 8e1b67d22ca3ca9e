"""Tiny GGUF files with random weights, one of each kind of metadata that changes the numbers; the same for the same name.

llama.cpp's tokens for them were recorded by tests/data/make_gguf_tokens.py, which runs outside this project's environment:
nothing but numpy and gguf is imported here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter, TokenType

Array = npt.NDArray[np.float32]
Value = bool | int | float | str | list[int] | list[bool]

TOKENS = 24
"""How many are recorded for each prompt."""
VOCAB = 261
OTHERS = ("<unk>", "<s>", "</s>")
"""Special tokens that llama.cpp looks for in a phi3."""
HIDDEN, FEED, HEADS, KEYS, HEAD = 64, 96, 4, 2, 16
"""Hidden size, feed-forward size, heads, heads of keys and values, and size of a head."""
CONTEXT = 128
LONG, ORIGINAL = 512, 256
"""Context lengths of the kinds with longrope; llama.cpp takes no context of less than 256."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of random tokens, and the context that llama.cpp has for it (which chooses longrope's factors)."""

    length: int
    context: int = 256

    def ids(self, salt: int = 0) -> list[int]:
        """The tokens, the same for the same salt."""
        return [int(id) for id in np.random.default_rng([self.length, salt]).integers(1, 258, self.length)]


@dataclass(frozen=True)
class Kind:
    """One file: its architecture, the keys beyond the common ones, and the shapes of its tensors."""

    architecture: str
    shapes: Mapping[str, tuple[int, ...]]
    keys: Mapping[str, Value] = field(default_factory=dict)
    """After the architecture's name; they stand over the common ones."""
    fixed: Mapping[str, Array] = field(default_factory=dict)
    """Tensors that are not random."""
    prompts: tuple[Prompt, ...] = (Prompt(7), Prompt(70))
    embedding: float = 1.0
    """Standard deviation of the embedding's rows."""
    seed: str = ""
    """Kinds of one seed have the same weights, as far as they have the same names."""

    @property
    def vocabulary(self) -> str:
        """What such models are published with: a kind of vocabulary, or the rule by which a byte-level one splits text."""
        if self.architecture == "llama" and any("exps" in name for name in self.shapes):
            return "sentencepiece"
        return _PUBLISHED[self.architecture]


def write(name: str, path: Path) -> Path:
    """Write the kind of that name to `path`."""
    kind = KINDS[name]
    writer = GGUFWriter(path, kind.architecture)
    writer.add_name(name)
    common: dict[str, Value] = {
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "block_count": 2,
        "feed_forward_length": FEED,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEYS,
    }
    for key, value in (common | dict(kind.keys)).items():
        _add(writer, f"{kind.architecture}.{key}", value)
    _VOCABULARIES[kind.vocabulary](writer, kind.vocabulary)
    for tensor, values in tensors(kind, name).items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(kind: Kind, name: str) -> dict[str, Array]:
    """The weights, by their names; each is drawn from a seed of its own."""
    made = {tensor: _random(f"{kind.seed or name}/{tensor}", tensor, shape, kind) for tensor, shape in kind.shapes.items()}
    return made | dict(kind.fixed)


def _random(seed: str, tensor: str, shape: tuple[int, ...], kind: Kind) -> Array:
    noise = np.random.default_rng(crc32(seed.encode())).standard_normal(shape).astype(np.float32)
    if tensor.endswith(("norm.weight", "layer_output_scale.weight")) or ("_norm" in tensor and tensor.endswith(".weight")):
        return np.asarray(1 + 0.2 * noise, np.float32)
    if tensor in ("token_embd.weight", "position_embd.weight"):
        return np.asarray(kind.embedding * noise, np.float32)
    return np.asarray(0.2 * noise, np.float32)


def _add(writer: GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_bytes(writer: GGUFWriter, rule: str) -> None:
    """A byte-level vocabulary of every byte, one merge, and special tokens: the first one ends a text."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = [chr(byte) for byte in visible] + [chr(256 + number) for number in range(len(hidden))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(["<|endoftext|>", *characters, "Ġt", *OTHERS])
    writer.add_token_types([TokenType.CONTROL, *[TokenType.NORMAL] * 257, *[TokenType.CONTROL] * len(OTHERS)])
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


FALLBACK = [f"<0x{byte:02X}>" for byte in range(255)]
"""Tokens for bytes; the last one is in no UTF-8."""


def _add_sentencepiece(writer: GGUFWriter, kind: str) -> None:
    """Llama 2's kind of vocabulary: blanks are `▁`, one is put in front of a text, and merges go by scores."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*OTHERS, *FALLBACK, "▁", "t", "▁t"])
    writer.add_token_scores([0.0] * (VOCAB - 3) + [-3.0, -2.0, -1.0])
    writer.add_token_types([TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 255, *[TokenType.NORMAL] * 3])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_gemma(writer: GGUFWriter, kind: str) -> None:
    """Gemma's: no blank in front, and runs of blanks are tokens, which the SentencePiece file has as they are typed."""
    writer.add_tokenizer_model("gemma4" if kind == "gemma4" else "llama")
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", *FALLBACK, "▁", "▁▁" if kind == "gemma4" else "  "])
    last = TokenType.NORMAL if kind == "gemma4" else TokenType.USER_DEFINED
    writer.add_token_types([*[TokenType.CONTROL] * 3, TokenType.UNKNOWN, *[TokenType.BYTE] * 255, TokenType.NORMAL, last])
    writer.add_token_scores([-float(id) for id in range(VOCAB)])
    if kind == "gemma4":
        writer.add_token_merges(["▁ ▁"])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


_RULES = ("gpt-2", "llama-bpe", "qwen2", "refact", "starcoder", "falcon", "gpt-4o", "bloom", "minimax-m2")
_VOCABULARIES: dict[str, Callable[[GGUFWriter, str], None]] = {
    **dict.fromkeys(_RULES, _add_bytes),
    "sentencepiece": _add_sentencepiece,
    "gemma": _add_gemma,
    "gemma4": _add_gemma,
}
_PUBLISHED = {
    **dict.fromkeys(("stablelm", "gpt2"), "gpt-2"),  # the rule of StableLM's is not known here
    "bloom": "bloom",
    "minimax-m2": "minimax-m2",
    "llama": "llama-bpe",
    **dict.fromkeys(("qwen2", "qwen2moe", "qwen3", "qwen3moe"), "qwen2"),
    "granite": "refact",
    "starcoder2": "starcoder",
    "falcon": "falcon",
    "gpt-oss": "gpt-4o",
    **dict.fromkeys(("phi3", "nemotron"), "sentencepiece"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), "gemma"),
    "gemma4": "gemma4",
}
"""`Kind.vocabulary` by the architecture; of llama, it is the dense ones'."""

Shapes = dict[str, tuple[int, ...]]


def _layers(shapes: Shapes, count: int = 2) -> Shapes:
    """`shapes` of a block, for each of `count` blocks."""
    return {f"blk.{layer}.{name}": shape for layer in range(count) for name, shape in shapes.items()}


def _ends(*, tied: bool = False, bias: bool = False, hidden: int = HIDDEN) -> Shapes:
    ends: Shapes = {"token_embd.weight": (VOCAB, hidden), "output_norm.weight": (hidden,)}
    ends |= {"output_norm.bias": (hidden,)} if bias else {}
    return ends if tied else ends | {"output.weight": (VOCAB, hidden)}


def _attention(*, head: int = HEAD, bias: str = "", hidden: int = HIDDEN, keys: int = KEYS) -> Shapes:
    """The attention's matrices; `bias` names those that have one, as `qkvo`."""
    rows = {"q": HEADS * head, "k": keys * head, "v": keys * head, "output": hidden}
    columns = {"q": hidden, "k": hidden, "v": hidden, "output": HEADS * head}
    shapes: Shapes = {f"attn_{name}.weight": (rows[name], columns[name]) for name in rows}
    return shapes | {f"attn_{name}.bias": (rows[name],) for name in rows if name[0] in bias}


def _norms(*names: str, bias: bool = False, hidden: int = HIDDEN) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (hidden,) for name in names}
    return shapes | ({f"{name}.bias": (hidden,) for name in names} if bias else {})


def _mlp(*, gated: bool = True, bias: bool = False, hidden: int = HIDDEN, feed: int = FEED) -> Shapes:
    shapes: Shapes = {"ffn_up.weight": (feed, hidden), "ffn_down.weight": (hidden, feed)}
    shapes |= {"ffn_gate.weight": (feed, hidden)} if gated else {}
    sizes = {"ffn_up": feed, "ffn_down": hidden, "ffn_gate": feed}
    return shapes | ({f"{name}.bias": (size,) for name, size in sizes.items() if f"{name}.weight" in shapes} if bias else {})


def _experts(count: int = 4, feed: int = FEED) -> Shapes:
    return {
        "ffn_gate_inp.weight": (count, HIDDEN),
        "ffn_gate_exps.weight": (count, feed, HIDDEN),
        "ffn_up_exps.weight": (count, feed, HIDDEN),
        "ffn_down_exps.weight": (count, HIDDEN, feed),
    }


def _factors(low: float, high: float, count: int = HEAD // 2) -> Array:
    return np.linspace(low, high, count, dtype=np.float32)


_TWO = _norms("attn_norm", "ffn_norm")
_LLAMA = _ends() | _layers(_TWO | _attention() | _mlp())
_RMS: dict[str, Value] = {"attention.layer_norm_rms_epsilon": 1e-5}
_EPS: dict[str, Value] = {"attention.layer_norm_epsilon": 1e-4}
_LAYER_NORMS = _norms("attn_norm", "ffn_norm", bias=True)
_QK_NORMS: Shapes = {"attn_q_norm.weight": (24,), "attn_k_norm.weight": (24,)}
_WIDE: dict[str, Value] = {"attention.key_length": 24, "attention.value_length": 24}
_LONGROPE = {"rope_factors_long.weight": _factors(1.5, 9.0), "rope_factors_short.weight": _factors(1.0, 1.4)}
_LONG_KEYS: dict[str, Value] = {
    "context_length": LONG,
    "rope.scaling.original_context_length": ORIGINAL,
    "rope.scaling.attn_factor": 1.15,
}
_LONG_PROMPTS = (Prompt(30, ORIGINAL), Prompt(220, ORIGINAL), Prompt(300, LONG))
_GEMMA = _norms("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_PARTIAL: dict[str, Value] = {"rope.dimension_count": 8}

KINDS: dict[str, Kind] = {
    "llama": Kind("llama", _LLAMA, _RMS, seed="llama"),
    "llama-theta": Kind("llama", _LLAMA, _RMS | {"rope.freq_base": 500.0, "rope.dimension_count": HEAD}, seed="llama"),
    "llama-epsilon": Kind("llama", _LLAMA, {"attention.layer_norm_rms_epsilon": 0.3}, seed="llama"),
    "llama-linear": Kind("llama", _LLAMA, _RMS | {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, seed="llama"),
    "llama-scale-linear": Kind("llama", _LLAMA, _RMS | {"rope.scale_linear": 4.0}, seed="llama"),
    "llama-none": Kind("llama", _LLAMA, _RMS | {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, seed="llama"),
    "llama-yarn": Kind(
        "llama",
        _LLAMA,
        _RMS
        | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": 1.3,
            "rope.freq_base": 500.0,
        },
        seed="llama",
    ),
    "llama-frequencies": Kind("llama", _LLAMA, _RMS, {"rope_freqs.weight": _factors(1.0, 8.0)}, seed="llama"),
    "llama-frequencies-yarn": Kind(
        "llama",
        _LLAMA,
        _RMS
        | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.freq_base": 500.0,
        },
        {"rope_freqs.weight": _factors(1.0, 8.0)},
        seed="llama",
    ),
    "llama-longrope": Kind(
        "llama", _LLAMA, _RMS | _LONG_KEYS | {"rope.scaling.type": "longrope"}, _LONGROPE, _LONG_PROMPTS, seed="llama"
    ),
    "llama-tied": Kind(
        "llama",
        _ends(tied=True) | _layers(_TWO | _attention(head=24, bias="qkvo") | _mlp(bias=True)),
        _RMS | _WIDE | {"rope.dimension_count": 24},
    ),
    "mixtral": Kind(
        "llama", _ends() | _layers(_TWO | _attention() | _experts()), _RMS | {"expert_count": 4, "expert_used_count": 2}
    ),
    "granite": Kind(
        "granite",
        _LLAMA,
        _RMS | {"logit_scale": 3.0, "embedding_scale": 5.0, "residual_scale": 0.5, "attention.scale": 0.125},
    ),
    "qwen2": Kind("qwen2", _ends(tied=True) | _layers(_TWO | _attention(bias="qkv") | _mlp()), _RMS, seed="qwen2"),
    "qwen2-yarn": Kind(
        "qwen2",
        _ends(tied=True) | _layers(_TWO | _attention(bias="qkv") | _mlp()),
        _RMS
        | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.freq_base": 900.0,
        },
        seed="qwen2",
    ),
    "qwen3": Kind("qwen3", _ends() | _layers(_TWO | _attention(head=24) | _QK_NORMS | _mlp()), _RMS | _WIDE),
    "qwen2moe": Kind(
        "qwen2moe",
        _ends()
        | _layers(
            _TWO
            | _attention(bias="qkv")
            | _experts(feed=32)
            | {
                "ffn_gate_inp_shexp.weight": (HIDDEN,),
                "ffn_gate_shexp.weight": (48, HIDDEN),
                "ffn_up_shexp.weight": (48, HIDDEN),
                "ffn_down_shexp.weight": (HIDDEN, 48),
            }
        ),
        _RMS
        | {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 48,
        },
    ),
    "qwen3moe": Kind(
        "qwen3moe",
        _ends() | _layers(_TWO | _attention(head=24) | _QK_NORMS | _experts(feed=32)),
        _RMS | _WIDE | {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "minimax-m2": Kind(
        "minimax-m2",
        _ends()
        | _layers(
            _TWO
            | _attention(head=24)
            | {"attn_q_norm.weight": (HEADS * 24,), "attn_k_norm.weight": (KEYS * 24,), "exp_probs_b.bias": (4,)}
            | _experts()
        ),
        _RMS
        | _WIDE
        | {
            "rope.dimension_count": 12,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": FEED,
            "expert_gating_func": 2,
        },
    ),
    "phi3": Kind(
        "phi3",
        _ends()
        | _layers(
            _TWO
            | {
                "attn_qkv.weight": ((HEADS + 2 * KEYS) * HEAD, HIDDEN),
                "attn_output.weight": (HIDDEN, HIDDEN),
                "ffn_up.weight": (2 * FEED, HIDDEN),
                "ffn_down.weight": (HIDDEN, FEED),
            }
        ),
        _RMS | {"rope.dimension_count": HEAD, "attention.sliding_window": 100},
        seed="phi3",
    ),
    "gemma": Kind(
        "gemma",
        _ends(tied=True) | _layers(_TWO | _attention(head=24) | _mlp()),
        _RMS | _WIDE,
        embedding=0.1,
    ),
    "gemma2": Kind(
        "gemma2",
        _ends(tied=True) | _layers(_GEMMA | _attention(head=24) | _mlp(), 3),
        _RMS
        | _WIDE
        | {
            "block_count": 3,
            "attention.sliding_window": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
        embedding=0.1,
    ),
    "gemma2-27b": Kind(
        "gemma2",
        _ends(tied=True, hidden=32)
        | _layers(
            _norms("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", hidden=32)
            | _attention(hidden=32)
            | _mlp(hidden=32, feed=32),
            46,
        ),
        _RMS
        | {
            "block_count": 46,
            "embedding_length": 32,
            "feed_forward_length": 32,
            "attention.key_length": HEAD,
            "attention.value_length": HEAD,
            "attention.sliding_window": 16,
        },
        embedding=0.3,
    ),
    "gemma3": Kind(
        "gemma3",
        _ends(tied=True) | _layers(_GEMMA | _attention(head=24) | _QK_NORMS | _mlp(), 7),
        _RMS
        | _WIDE
        | {
            "block_count": 7,
            "attention.sliding_window": 16,
            "rope.freq_base": 1000.0,
            "rope.freq_base_swa": 50.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "final_logit_softcapping": 1.5,
        },
        embedding=0.1,
    ),
    "gemma3-pattern": Kind(
        "gemma3",
        _ends(tied=True) | _layers(_GEMMA | _attention(head=24) | _QK_NORMS | _mlp(), 3),
        _RMS
        | _WIDE
        | {
            "block_count": 3,
            "attention.sliding_window": 16,
            "attention.sliding_window_pattern": [False, True, False],
        },
        embedding=0.1,
    ),
    "starcoder2": Kind(
        "starcoder2",
        _ends(bias=True) | _layers(_LAYER_NORMS | _attention(bias="qkvo") | _mlp(gated=False, bias=True)),
        _EPS | {"rope.freq_base": 500.0},
    ),
    "stablelm": Kind(
        "stablelm",
        _ends(bias=True) | _layers(_LAYER_NORMS | _attention(bias="qkv") | _mlp()),
        _EPS | _PARTIAL | {"use_parallel_residual": False, "rope.freq_base": 500.0},
    ),
    "stablelm-parallel": Kind(
        "stablelm",
        _ends(bias=True)
        | _layers(
            _norms("attn_norm", bias=True)
            | _attention()
            | _mlp()
            | {"attn_q_norm.weight": (HEADS, HEAD), "attn_k_norm.weight": (KEYS, HEAD)}
        ),
        _EPS | _PARTIAL | {"use_parallel_residual": True},
    ),
    "nemotron": Kind(
        "nemotron",
        _ends(bias=True) | _layers(_LAYER_NORMS | _attention() | _mlp(gated=False)),
        _EPS | _PARTIAL | {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
    ),
    "gpt2": Kind(
        "gpt2",
        _ends(bias=True)
        | {"position_embd.weight": (CONTEXT, HIDDEN)}
        | _layers(
            _LAYER_NORMS
            | {
                "attn_qkv.weight": (3 * HIDDEN, HIDDEN),
                "attn_qkv.bias": (3 * HIDDEN,),
                "attn_output.weight": (HIDDEN, HIDDEN),
                "attn_output.bias": (HIDDEN,),
            }
            | _mlp(gated=False, bias=True)
        ),
        _EPS | {"attention.head_count_kv": HEADS},
    ),
    "bloom": Kind(
        "bloom",
        _ends(bias=True)
        | _norms("token_embd_norm", bias=True)
        | _layers(
            _LAYER_NORMS
            | {
                "attn_qkv.weight": (3 * HIDDEN, HIDDEN),
                "attn_qkv.bias": (3 * HIDDEN,),
                "attn_output.weight": (HIDDEN, HIDDEN),
                "attn_output.bias": (HIDDEN,),
            }
            | _mlp(gated=False, bias=True, feed=4 * HIDDEN)
        ),
        _EPS | {"attention.head_count_kv": HEADS, "feed_forward_length": 4 * HIDDEN},
    ),
    "falcon": Kind(
        "falcon",
        _ends(bias=True)
        | _layers(
            _norms("attn_norm", bias=True)
            | {"attn_qkv.weight": ((HEADS + 2) * HEAD, HIDDEN), "attn_output.weight": (HIDDEN, HIDDEN)}
            | _mlp(gated=False, feed=4 * HIDDEN)
        ),
        _EPS | {"attention.head_count_kv": 1, "feed_forward_length": 4 * HIDDEN, "tensor_data_layout": "jploski"},
    ),
    "falcon-40b": Kind(
        "falcon",
        _ends(bias=True)
        | _layers(
            _norms("attn_norm", "attn_norm_2", bias=True)
            | {"attn_qkv.weight": ((HEADS + 2 * KEYS) * HEAD, HIDDEN), "attn_output.weight": (HIDDEN, HIDDEN)}
            | _mlp(gated=False, feed=4 * HIDDEN)
        ),
        _EPS | {"feed_forward_length": 4 * HIDDEN, "tensor_data_layout": "jploski"},
    ),
}
_GPT_OSS_EXPERTS = _experts() | {
    "ffn_gate_inp.bias": (4,),
    "ffn_gate_exps.bias": (4, FEED),
    "ffn_up_exps.bias": (4, FEED),
    "ffn_down_exps.bias": (4, HIDDEN),
}
KINDS["gpt-oss"] = Kind(
    "gpt-oss",
    _ends()
    | _layers(
        _norms("attn_norm", "post_attention_norm")
        | _attention(head=24, bias="qkvo")
        | {"attn_sinks.weight": (HEADS,)}
        | _GPT_OSS_EXPERTS,
        3,
    ),
    _RMS
    | _WIDE
    | {
        "block_count": 3,
        "attention.sliding_window": 16,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": FEED,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "rope.freq_base": 900.0,
    },
)


def _gemma4(layer: int, *, shared: bool, equal: bool, wide: bool, inputs: int, keys: int) -> Shapes:
    """A layer of gemma4: every second one is full, with heads of 24 numbers in place of 16."""
    head = 24 if layer % 2 else HEAD
    attention = _attention(head=head, keys=keys if layer % 2 else KEYS)
    norms: Shapes = {"attn_q_norm.weight": (head,)}
    norms |= {} if shared else {"attn_k_norm.weight": (head,)}
    gone = {"attn_k.weight", "attn_v.weight"} if shared else {"attn_v.weight"} if equal and layer % 2 else set()
    shapes = _GEMMA | _mlp(feed=2 * FEED if wide else FEED) | norms | {"layer_output_scale.weight": (1,)}
    shapes |= {name: shape for name, shape in attention.items() if name not in gone}
    if inputs:
        shapes |= {"inp_gate.weight": (inputs, HIDDEN), "proj.weight": (HIDDEN, inputs), "post_norm.weight": (HIDDEN,)}
    return {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}


_GEMMA4: dict[str, Value] = {
    "attention.sliding_window": 16,
    "attention.key_length": 24,
    "attention.value_length": 24,
    "attention.key_length_swa": HEAD,
    "attention.value_length_swa": HEAD,
    "rope.dimension_count": 24,
    "rope.dimension_count_swa": HEAD,
    "rope.freq_base": 1000.0,
    "rope.freq_base_swa": 50.0,
    "final_logit_softcapping": 1.5,
}
_TURNED = {"rope_freqs.weight": np.array([1.0] * 3 + [1e30] * 9, np.float32)}
KINDS["gemma4"] = Kind(
    "gemma4",
    _ends(tied=True)
    | {
        "per_layer_token_embd.weight": (VOCAB, 6 * 8),
        "per_layer_model_proj.weight": (6 * 8, HIDDEN),
        "per_layer_proj_norm.weight": (8,),
    }
    | {
        name: shape
        for layer in range(6)
        for name, shape in _gemma4(layer, shared=layer > 3, equal=False, wide=layer > 3, inputs=8, keys=KEYS).items()
    },
    _RMS
    | _GEMMA4
    | {
        "block_count": 6,
        "feed_forward_length": [FEED] * 4 + [2 * FEED] * 2,
        "attention.sliding_window_pattern": [True, False] * 3,
        "attention.shared_kv_layers": 2,
        "embedding_length_per_layer_input": 8,
    },
    _TURNED,
    embedding=0.1,
)
KINDS["gemma4-large"] = Kind(
    "gemma4",
    _ends(tied=True)
    | {
        name: shape
        for layer in range(4)
        for name, shape in _gemma4(layer, shared=False, equal=True, wide=False, inputs=0, keys=1).items()
    },
    _RMS
    | _GEMMA4
    | {
        "block_count": 4,
        "attention.head_count_kv": [KEYS, 1] * 2,
        "attention.sliding_window_pattern": [True, False] * 2,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
    },
    _TURNED,
    embedding=0.1,
)
KINDS["phi3-longrope"] = Kind(
    "phi3",
    KINDS["phi3"].shapes,
    _RMS | _LONG_KEYS | {"rope.dimension_count": 12},
    {name: np.ascontiguousarray(values[:6]) for name, values in _LONGROPE.items()},
    _LONG_PROMPTS,
    seed="phi3",
)
