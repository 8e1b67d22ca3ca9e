"""What an engine on the CPU takes of the machine's memory at its fullest, from the manifest alone.

Measured on x86-64 with ONNX Runtime 1.31, slots full, as the peak of the resident memory less the slots and the weights' files
(the default model): int4 171 to 200 MiB, float32 175 to 197 MiB, for 1 to 8 slots of 64 to 2,048 tokens. Each file of weights
is resident once: mapped, or read and packed.
"""

from dataclasses import dataclass

from runtime.bundle import Variant

PROCESS = 208 << 20
"""Bytes of a worker without its weights and slots: the interpreter, NumPy, ONNX Runtime, and what loading leaves behind."""
CHUNK = 128
"""Prompt tokens of a step on the CPU: more gain nothing there, and between two steps the loop takes what has arrived."""
GROUP = 8
"""Query heads for each of the keys' and values' heads, at most; manifests do not tell how many there are."""
LOGITS = 8
"""Arrays of a step that are as large as its logits, at most: sorting and summing the vocabulary for a draw takes several."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory, by what they are for."""

    weights: int
    kv: int
    workspace: int
    slots: int
    context: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.kv + self.workspace

    def arithmetic(self) -> str:
        """How the total comes about, for a person."""
        return (
            f"{self.weights >> 20:,} MiB of weights, {self.slots} slots of {self.context:,} tokens: {self.kv >> 20:,} MiB, "
            f"{self.workspace >> 20:,} MiB for the process and a step"
        )


def footprint(variant: Variant, slots: int, context: int, vocab_size: int) -> Footprint:
    """The most that a worker's resident memory comes to with `slots` full slots of `context` tokens."""
    heads = GROUP * max((layer.kv_heads for layer in variant.layers), default=0)
    scores = heads * CHUNK * context * 4
    logits = LOGITS * slots * vocab_size * 4
    weights = sum(file.size for file in variant.files)
    return Footprint(weights, variant.kv_bytes_per_token * slots * context, PROCESS + scores + logits, slots, context)
