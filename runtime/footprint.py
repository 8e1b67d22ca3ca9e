"""What an engine on a CPU needs in memory once every slot is full, told from its manifest alone, and without ONNX Runtime.

The constants bound the peak (VmHWM) of real workers whose slots were filled to their end, with ONNX Runtime 1.32 on two threads
of an x86-64. The bound was, as a multiple of the peak (39 measurements, int4 and fp32):

* SmolLM2-135M, from 1 slot of 512 tokens to 200 of 128, and 1 of 8192: 1.02 to 1.17;
* Llamas of 245 million random weights, 4 or 2 KV heads of 16, 1 slot of 4096 tokens and 32 of 256: 1.07 to 1.20;
* one of 11 million, as many KV heads as heads: 1.09 to 1.38, the most with one slot;
* a Bloom of 50 million, with explicit attention: 1.05 to 1.26;
* two layers 64 wide, where the process is nearly all of it, 1 slot and 64: 1.16 to 1.28.

Five more workers of the first four kinds, measured after the constants were set: 1.06 to 1.18.
"""

from dataclasses import dataclass

from runtime.bundle import Encoder, Variant

MIB = 2**20
CHUNK = 128
"""Prompt tokens of a step: a larger one gains nothing on a CPU, and between two steps the loop takes what has arrived."""
ROWS = 64
"""Logit rows of a step that scores a prompt's tokens."""
_PROCESS = 80 * MIB
"""Python, ONNX Runtime and what they load: 73 MiB with two layers of 64 wide and one slot of 256 tokens."""
_PACKED = 1.1
"""Of the weights' size: they stand in memory once, but the peak while they are loaded was up to 120 MiB above what was left
then, about as much as those models' largest table has in float32."""
_FLOOR = 8 * MIB
_ACTIVATIONS = 110 * MIB
"""What a chunk computes on its way, the arena around it, and pages of the weights' file beside what was packed from them."""
_ACTIVATIONS_SHARE = 1 / 3
"""Of the weights' size that these are where the weights are small."""
_GROUP = 8
"""Query heads of a KV head, at most, in nearly all models; the manifest does not tell. Where attention is explicit, there are
mostly as many KV heads as query heads; Bloom then took five times its scores."""
_SCORED = 26
"""Bytes for each logit of a step that scores a prompt's tokens: they, their logarithms and a padded copy. Measured: 24."""
_SAMPLER = 60
"""Bytes for each logit of a step that draws at random, under masks and with penalties, from a distribution so flat that all of
it is sorted. Measured: 60 (64 rows); 39 without masks and penalties; 14 (200 rows) to 23 (96) where 256 tokens were enough."""


_CONSTRAINED = 1300
"""Bytes for each token of the vocabulary once an answer is to keep to a constraint. Measured: 60 MB with 49,152. Grammars that
are kept for the next answer are not reckoned: mostly some MB, at worst `runtime.grammar.IDLE_TOKENS` of growth."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory, by what they are for; `total` bounds the process's resident set."""

    slots: int
    context: int
    """Tokens of a slot."""
    per_token: int
    """Bytes of a token's keys and values."""
    process: int
    weights: int
    workspace: int
    """Of a step."""

    @property
    def kv(self) -> int:
        """Bytes of the slots when all are full."""
        return self.slots * self.context * self.per_token

    @property
    def total(self) -> int:
        """Bytes altogether."""
        return self.process + self.weights + self.kv + self.workspace

    def arithmetic(self) -> str:
        """How the total comes about, as a part of a sentence."""
        return (
            f"weights {_mib(self.weights)} + {self.slots} slots x {self.context} tokens x {self.per_token} bytes = "
            f"{_mib(self.kv)} of KV + {_mib(self.process + self.workspace)} for the process and a step's workspace"
        )


def footprint(variant: Variant, vocab_size: int, *, slots: int, context: int) -> Footprint:
    """Of a worker that runs `variant`, for the cpu, with `slots` slots of `context` tokens and without a draft engine.

    With a draft engine, its own `weights`, `kv` and `workspace` come on top. `vocab_size` is the bundle's.
    """
    heads = _GROUP * max((layer.kv_heads for layer in variant.layers), default=0)
    # Of one layer, [heads, CHUNK, context] float32 for a prompt and [slots, heads, context] for a decode step.
    scores = heads * max(CHUNK, slots) * context * 4
    logits = max(slots * _SAMPLER, ROWS * _SCORED) * vocab_size
    activations = _FLOOR + min(_ACTIVATIONS, int(variant.size * _ACTIVATIONS_SHARE))
    return Footprint(
        slots=slots,
        context=context,
        per_token=variant.kv_bytes_per_token,
        process=_PROCESS,
        weights=int(variant.size * _PACKED),
        workspace=activations + scores + logits + _CONSTRAINED * vocab_size,
    )


TEXT_TOKENS = 512
"""Tokens of a batch of texts, padding included, unless one text is longer: on a CPU a larger one gains nothing, and whoever
comes next waits for its end."""
VECTOR_BYTES = 64 * MIB
"""That the embeddings may take which requests wait for that are not done; one request alone may have as many as it wants."""
_SCORES = 3
"""Copies of a layer's scores that there are at the same time: as products, under the mask, as probabilities."""
_WIDEST = 8
"""Activations of the widest kind that there are at the same time; int8 products have theirs twice over."""
_MESSAGES = 32 * MIB
"""Texts that wait, as lists of tokens, and the answer that is being sent."""


@dataclass(frozen=True)
class EncoderFootprint:
    """Bytes of memory of a worker for embeddings, by what they are for; `total` bounds the process's resident set."""

    context: int
    """Tokens of a text."""
    process: int
    weights: int
    workspace: int
    """Of a batch."""

    @property
    def total(self) -> int:
        """Bytes altogether."""
        return self.process + self.weights + self.workspace

    def arithmetic(self) -> str:
        """How the total comes about, as a part of a sentence."""
        return (
            f"weights {_mib(self.weights)} + {_mib(self.workspace)} for a batch of {max(TEXT_TOKENS, self.context)} tokens in "
            f"texts of up to {self.context} + {_mib(self.process)} for the process and the embeddings that wait for others"
        )


def encoder_footprint(variant: Variant, encoder: Encoder, *, context: int) -> EncoderFootprint:
    """Of a worker that runs `variant`, for the cpu, with texts of up to `context` tokens."""
    tokens = max(TEXT_TOKENS, context)
    scores = encoder.heads * tokens * context * 4
    activations = encoder.width * tokens * 4
    return EncoderFootprint(
        context=context,
        process=_PROCESS + VECTOR_BYTES + _MESSAGES,
        weights=int(variant.size * _PACKED),
        workspace=_FLOOR + _SCORES * scores + _WIDEST * activations,
    )


def _mib(size: int) -> str:
    return f"{-(-size // MIB)} MiB"
