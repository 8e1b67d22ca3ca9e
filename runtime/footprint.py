"""What an engine on the CPU takes of the machine's memory at its fullest, from the manifest alone."""

from dataclasses import dataclass

from runtime.bundle import Variant

PROCESS = 128 << 20
"""Bytes of a worker without its engine: the interpreter, NumPy, ONNX Runtime, and arenas that grow by doubling."""
WEIGHTS = 2.0


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
            f"{self.weights >> 20:,} MiB of weights + {self.slots} slots of {self.context:,} tokens: {self.kv >> 20:,} MiB + "
            f"{self.workspace >> 20:,} MiB for a step and the process"
        )


def footprint(variant: Variant, slots: int, context: int, vocab_size: int) -> Footprint:
    """The most that a worker's resident memory comes to with `slots` full slots of `context` tokens."""
    weights = int(WEIGHTS * sum(file.size for file in variant.files))
    return Footprint(weights, variant.kv_bytes_per_token * slots * context, PROCESS, slots, context)
