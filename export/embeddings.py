"""The variants of a model for embeddings: traced once, made into files, and proven against transformers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from export import batches, encoder, fuse, graph, positions, quantize, verify
from export.compile import BITS, PACKAGES
from export.errors import ExportError, UnsupportedModel
from export.recipe import Build
from export.sentence import Sentence, check_width
from export.stage import Stages
from runtime import bundle
from runtime.bundle import Bundle, Encoder, Variant, Verification
from runtime.encoder import Embedder, OrtEncoder
from runtime.engine import EngineError, Float32

EQUAL = 0.9999
"""Cosine from which on an embedding counts as the reference's own."""
LEAST_COSINE = 0.7
"""Cosine below which a quantized variant is taken for broken rather than for coarse."""
_LENGTHS = (1, 2, 3, 7, 16, 33, 64, 100, 255, 512)
"""Of the random texts, as far as the model has positions; together they are one ragged batch."""

_MAX_WORK = 3e11
"""Weights times tokens up to which a text is compared: a minute of two cores."""


@dataclass
class EmbeddingJob:
    """What building the variants of one model for embeddings shares."""

    model: PreTrainedModel
    sentence: Sentence
    workshop: Path
    stage: Stages
    verify: bool
    tokenize: Callable[[str], list[int]]
    longest: int | None = None
    """Tokens that a text may have, where it is not as many as the model's own files say."""

    def __post_init__(self) -> None:
        with self.stage("survey") as stage:
            check_width(self.sentence, int(self.model.config.get_text_config().hidden_size))
            seen = encoder.survey(self.model, self.sentence)
            if self.longest is not None and self.longest > seen.max_length:
                raise UnsupportedModel(
                    f"{type(self.model).__name__} was made for {seen.max_length} positions; --max-length {self.longest} is more"
                )
            self.max_length = min(self.longest or self.sentence.max_tokens or seen.max_length, seen.max_length)
            stage.note = f"{self.sentence.pooling} pooling, texts of up to {self.max_length} tokens"
        self.vocab = int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        with self.stage("trace") as stage:
            self._traced = encoder.trace(self.model, self.sentence, seen, stage.advance)
            fuse.fuse(self._traced)
            self.encoder: Encoder = encoder.describe(self.model, self.sentence, self._traced)
            stage.note = f"{sum(1 for _ in self._traced.graph)} operators, {self.encoder.dimensions} numbers an embedding"

    def build(self, build: Build) -> Variant:
        """Write the files of `build` into its folder and prove them. Raises ExportError."""
        if build.target != "cpu":
            raise ExportError(f"embeddings are computed on the CPU only; variant {build.name!r} cannot be built for them")
        with self.stage(f"{build.name}: compile") as stage:
            traced, report = self._traced.clone(), None
            if build.precision == "int8":
                report = quantize.quantize_embeddings(traced, self.vocab)
                batches.widen(traced)
            elif build.precision == "int4":
                report = quantize.quantize(traced, BITS[build.precision], self.vocab)
            variant = self._written(build, traced)
            stage.note = f"{variant.size / 1e6:.0f} MB"
            if report is not None and build.precision == "int4":
                stage.note += f", {report.weights / 1e6:.0f}M weights quantized"
        return self._proved(variant) if self.verify else variant

    def _written(self, build: Build, traced: ir.Model) -> Variant:
        folder = self.workshop / build.name
        folder.mkdir()
        graph.tidy(traced)
        step_bytes = graph.step_bytes(traced)
        graph.write(traced, folder)
        files = tuple(bundle.describe(self.workshop, f"{build.name}/{name}") for name in (graph.MODEL, graph.WEIGHTS))
        return Variant(
            name=build.name,
            target=build.target,
            precision=build.precision,
            kv_dtype="float32",
            model=files[0].path,
            files=files,
            layers=(),
            builder=", ".join(f"{name} {version(name)}" for name in PACKAGES),
            attention="explicit",
            opset=graph.OPSET,
            step_bytes=step_bytes,
        )

    def _proved(self, variant: Variant) -> Variant:
        with self.stage(f"{variant.name}: verify") as stage:
            texts = probes(self.vocab, self._lengths()) + [
                tokens for prompt in verify.PROMPTS if (tokens := self.tokenize(prompt)[: self.max_length])
            ]
            try:
                engine = OrtEncoder(self.workshop, self._manifest(variant), variant, context=self.max_length)
                found = compare(self.model, self.sentence, engine, texts)
            except EngineError as error:
                raise UnsupportedModel(f"variant {variant.name!r} was compiled but fails when it runs: {error}") from error
            least, equal = float(found.min()), int((found >= EQUAL).sum())
            stage.note = f"cosine with transformers' embeddings {least:.6f} at least, over {len(texts)} texts"
            name = type(self.model).__name__
            floor = EQUAL if variant.precision == "fp32" else LEAST_COSINE
            if not least >= floor:  # so that NaN does not pass
                raise UnsupportedModel(
                    f"{name} in {variant.precision}: an embedding has cosine {least:.4f} with transformers' own; {floor} is "
                    "the least that is published (--no-verify publishes it all the same)"
                )
        reference = f"transformers {version('transformers')}, fp32"
        proof = Verification(
            reference,
            prompts=len(texts),
            tokens=len(texts),
            equal=equal,
            cosine=round(least, 6),
            longest=max(map(len, texts)),
        )
        return msgspec.structs.replace(variant, verification=proof)

    def _lengths(self) -> list[int]:
        """Of the texts that are compared: `_LENGTHS`, and past those of the configuration as far as that takes no age."""
        ends = positions.row_lengths(self.model.config.get_text_config(), self.max_length)
        named = [length for length in ends if positions.affordable(self.model, length, _MAX_WORK)]
        return sorted({min(length, self.max_length) for length in (*_LENGTHS, *named)})

    def _manifest(self, variant: Variant) -> Bundle:
        """What the engine reads of the bundle-to-be."""
        return Bundle(
            format=bundle.FORMAT,
            name=self.workshop.name,
            source=bundle.Source("folder", self.workshop.name),
            architecture=self.model.config.model_type,
            vocab_size=self.vocab,
            max_length=self.max_length,
            stop_ids=(),
            special_tokens={},
            files=(),
            variants=(variant,),
            created=0,
            task="feature-extraction",
            encoder=self.encoder,
        )


def probes(vocab: int, lengths: Sequence[int]) -> list[list[int]]:
    """Random texts of `lengths`; the same for the same arguments."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, vocab, length).tolist() for length in lengths]


def compare(model: PreTrainedModel, sentence: Sentence, engine: Embedder, texts: Sequence[list[int]]) -> Float32:
    """Cosines [texts] of the engine's embeddings, computed as one ragged batch, with transformers' of each text alone."""
    lengths = np.array([len(text) for text in texts], np.int64)
    ids = np.zeros((len(texts), int(lengths.max())), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    got = engine.embed(ids, lengths)
    expected = np.stack([reference(model, sentence, text) for text in texts])
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    cosines: Float32 = (got * expected).sum(1) / norms
    return cosines


@torch.no_grad()
def reference(model: PreTrainedModel, sentence: Sentence, text: list[int]) -> Float32:
    """transformers' embedding [dimensions] of one text, alone and without a mask, pooled here."""
    hidden = model(input_ids=torch.tensor([text])).last_hidden_state[0].float()
    pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[sentence.pooling]
    for layer in sentence.dense:
        pooled = layer(pooled)
    if sentence.normalized:
        pooled = torch.nn.functional.normalize(pooled, dim=-1)
    array: Float32 = pooled.numpy()
    return array
