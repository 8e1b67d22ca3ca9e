"""A model for embeddings on ONNX Runtime's CPU provider: whole texts in, one embedding each out. It keeps no state."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from runtime import bundle, ort
from runtime.bundle import Bundle, BundleError, Encoder, Variant
from runtime.engine import EngineError, Float32, Int64


class Embedder(Protocol):
    """What computes a batch of texts. Not thread-safe: one loop owns it."""

    context: int
    """Tokens of a text, at most."""
    vocab_size: int
    dimensions: int
    """Numbers of an embedding."""

    def embed(self, input_ids: Int64, lengths: Int64) -> Float32:
        """Embeddings [batch, dimensions] of texts [batch, seq] of `lengths` [batch], each at least 1, padded behind.

        What stands behind a text is any token; it changes nothing. Raises EngineError.
        """
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class OrtEncoder:
    """A variant of a bundle for embeddings."""

    def __init__(self, folder: Path, manifest: Bundle, variant: Variant, *, context: int, threads: int = 0) -> None:
        """Load `variant` of the bundle in `folder`, unverified. `threads` 0 means all cores this process may use."""
        encoder = facts(manifest)
        self.context, self.vocab_size, self.dimensions = context, manifest.vocab_size, encoder.dimensions
        # Batches come in too many shapes for a plan of the memory of each to be worth keeping.
        self._session = ort.session(folder / variant.model, threads, plan_memory=False)

    def embed(self, input_ids: Int64, lengths: Int64) -> Float32:
        """See `Embedder.embed`."""
        try:
            (embeddings,) = self._session.run(["embeddings"], {"input_ids": input_ids, "lengths": lengths})
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise EngineError(f"ONNX Runtime failed on a batch of {len(lengths)} texts: {error}") from error
        found: Float32 = np.asarray(embeddings, np.float32)
        return found

    def close(self) -> None:
        """Drop the session."""
        del self._session


def start(folder: Path, manifest: Bundle, variant: Variant, *, context: int | None, threads: int = 0) -> OrtEncoder:
    """The engine of `variant` of the bundle for embeddings in `folder`, its files verified.

    `context` None, or more than the model's own length, takes that. Raises BundleError or EngineError. As in `ort.start`, the
    weights are hashed while ONNX Runtime packs them.
    """
    if variant.target != "cpu":
        raise EngineError(f"variant {variant.name!r} is for {variant.target}; embeddings are computed on the CPU only")
    length = min(context or manifest.max_length, manifest.max_length)
    files = manifest.served(variant)
    bundle.verify(folder, [file for file in files if file.path == variant.model])
    with ThreadPoolExecutor(max_workers=1) as hashing:
        others = hashing.submit(bundle.verify, folder, [file for file in files if file.path != variant.model])
        try:
            return OrtEncoder(folder, manifest, variant, context=length, threads=threads)
        finally:
            others.result()  # Where the engine failed, too, the damaged file is the reason.


def facts(manifest: Bundle) -> Encoder:
    """What the manifest says of a model for embeddings. Raises BundleError where it is none."""
    if manifest.encoder is None:
        raise BundleError(f"bundle {manifest.name!r} says nothing of its embeddings; export the model again")
    return manifest.encoder
