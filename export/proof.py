"""What a variant must show before it is published: tokens and perplexity, by its engine, beside transformers'."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import msgspec
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from export import far, greedy, positions, verify
from export.errors import ExportError, UnsupportedModel
from export.stage import Stage, Stages
from export.step import Survey
from runtime.bundle import Perplexity, Variant, Verification
from runtime.engine import EngineError
from runtime.ort import OrtEngine

MAX_LONG_PROMPTS = 6
"""Prompts that go past lengths of the configuration, at the most."""
MIN_AGREEMENT = 0.5
"""Share of greedy tokens below which a quantized variant is taken for broken rather than for coarse."""
_FAR_SLOTS = 2
_CHANCE = 0.99
"""Of the vocabulary's size: the perplexity of a guess, but for rounding."""


@dataclass
class Proof:
    """Proves the variants of one model."""

    model: PreTrainedModel
    seen: Survey
    vocab: int
    workshop: Path
    """The folder in which the variants' folders are."""
    tokenizer: Tokenizer
    stage: Stages
    """Begins the stage of that name."""
    verifies: bool
    sample: tuple[Path, str] | None
    """The file that perplexity is measured on, and its text."""
    sample_tokens: int
    _references: dict[int, float] = field(default_factory=dict)
    """transformers' perplexity by the tokens that it is conditioned on."""

    def of(self, variant: Variant) -> Variant:
        """`variant` with what was found. Raises UnsupportedModel where that is not enough to be published."""
        if not self.verifies and self.sample is None:
            return variant
        if variant.kv_dtype == "bfloat16":
            with self.stage(f"{variant.name}: verify") as stage:
                stage.note = "left out: ONNX Runtime has no bfloat16 kernels for the CPU"
            return variant
        long = self._long_rows() if self.verifies else ()
        with self._engine(variant, len(verify.PROMPTS), max(verify.WINDOW, *long, 0)) as engine:
            if self.verifies:
                variant = msgspec.structs.replace(variant, verification=self._verify(engine, variant))
            if self.sample is not None:
                variant = msgspec.structs.replace(variant, perplexity=self._perplexity(engine, variant, *self.sample))
        return self._far(variant) if self.verifies else variant

    @contextmanager
    def _engine(self, variant: Variant, slots: int, context: int) -> Iterator[OrtEngine]:
        """The engine of `variant` on this machine's CPU; of a plan that of its ONNX, which says the same as the plan."""
        context, graph = min(self.seen.max_length, context), variant
        if variant.plan is not None:
            context, graph = variant.plan.capacity, msgspec.structs.replace(variant, model=variant.plan.source)
        try:
            engine = OrtEngine(self.workshop, graph, self.vocab, slots=slots, context=context)
        except EngineError as error:
            raise ExportError(
                f"variant {variant.name!r} was compiled but cannot be verified here: {error} (a smaller --max-length takes "
                "less, --no-verify publishes it unverified)"
            ) from error
        try:
            yield engine
        except EngineError as error:
            raise UnsupportedModel(f"variant {variant.name!r} was compiled but fails when it runs: {error}") from error
        finally:
            engine.close()

    # Tokens --------------------------------------------------------------------------------------------------------

    def _verify(self, engine: OrtEngine, variant: Variant) -> Verification:
        tie = verify.TIES.get(variant.precision, verify.TIE)
        with self.stage(f"{variant.name}: verify") as stage:
            length = min(engine.context, self.seen.max_length)
            count = min(verify.TOKENS, length // 2)
            prompts = self._prompts(length - count, count)
            answers = greedy.answer(engine, prompts, count, verify.CHUNK, stage.part(0, 0.5))
            agreement = verify.compare(
                self.model,
                prompts,
                answers,
                tie,
                self.seen.length_boundaries,
                stage.part(0.5, 1),
                padding=self.seen.padding,
            )
            longest = max(map(len, prompts)) + count
            stage.note = f"{agreement.equal} of {agreement.compared} greedy tokens are transformers'"
            if agreement.ties:
                stage.note += f", {agreement.ties} tied"
            stage.note += f", in rows of up to {longest} tokens"
            self._judge(variant, agreement)
        return Verification(
            f"transformers {version('transformers')}, fp32",
            len(prompts),
            agreement.compared,
            agreement.equal + agreement.ties,
            longest=longest,
        )

    def _far(self, variant: Variant) -> Variant:
        """`variant`, compared at the ends of rows that are too long to be computed as a whole."""
        rows = self._far_rows()
        if not rows or variant.verification is None:
            return variant
        longest, compared = variant.verification.longest, 0
        with self.stage(f"{variant.name}: far rows") as stage, self._engine(variant, _FAR_SLOTS, rows[-1]) as engine:
            tie = verify.TIES.get(variant.precision, verify.COARSE_TIE)
            for number, length in enumerate(length for length in rows if length <= engine.context):
                stage.advance(number / len(rows))
                found = far.compare(engine, self.model, self.seen, length, tie)
                if found is not None:
                    self._judge_far(found, length)
                    longest, compared = max(longest, length), compared + 1
            stage.note = f"{compared} rows of up to {longest} tokens, over a past that was made up"
        verification = msgspec.structs.replace(variant.verification, longest=longest)
        return msgspec.structs.replace(variant, verification=verification)

    def _prompts(self, room: int, answer: int) -> list[list[int]]:
        """Prompts of at most `room` tokens: the texts, and the same words over and over past lengths of the configuration.

        Those that cross where the model computes rows in another way come first.
        """
        texts = [self._encode(text) for text in verify.PROMPTS]
        words = list(itertools.chain.from_iterable(texts))
        around = [
            size
            for length in (*self.seen.length_boundaries, *reversed(self._long_rows()))
            if positions.affordable(self.model, length)
            for size in (length - answer // 2, length + 3)
        ]
        sizes = dict.fromkeys(min(size, room) for size in around if size > max(map(len, texts)))
        long = [(words * (size // len(words) + 1))[:size] for size in sorted(itertools.islice(sizes, MAX_LONG_PROMPTS))]
        return [text[:room] for text in texts] + long

    def _long_rows(self) -> tuple[int, ...]:
        """Lengths of the model's configuration, and its last one, as far as rows of them can be computed as a whole."""
        config, end = self.model.config.get_text_config(decoder=True), self.seen.max_length
        lengths = {*positions.configured_lengths(config, end), *self.seen.length_boundaries, end}
        return tuple(sorted(length for length in lengths if positions.affordable(self.model, length)))

    def _far_rows(self) -> tuple[int, ...]:
        """Of the lengths where something may change, those of rows over a past that must be made up, ascending."""
        lengths = positions.row_lengths(self.model.config.get_text_config(decoder=True), self.seen.max_length)
        far_ones = tuple(length for length in lengths if not positions.affordable(self.model, length))
        return positions.within_memory(self.seen, far_ones)

    def _judge(self, variant: Variant, agreement: verify.Agreement) -> None:
        name = type(self.model).__name__
        if variant.precision in verify.TIES and agreement.different:
            raise UnsupportedModel(
                f"{name}: the engine's tokens differ from transformers' in {agreement.different} of {agreement.compared} "
                f"places ({agreement.first}); the model does something that the step contract does not carry. "
                "Nothing was published (--no-verify publishes it all the same)"
            )
        if agreement.different > (1 - MIN_AGREEMENT) * agreement.compared:
            raise UnsupportedModel(
                f"{name} in {variant.precision}: only {agreement.equal} of {agreement.compared} greedy tokens are "
                f"transformers' own ({agreement.first}); try another precision (--no-verify publishes it all the same)"
            )

    def _judge_far(self, found: verify.Agreement, length: int) -> None:
        if found.different:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: at the end of a row of {length} tokens the engine's tokens differ from "
                f"transformers' in {found.different} of {found.compared} places ({found.first}). Nothing was published "
                f"(--max-length {length - 1} or less may leave the difference out; --no-verify publishes it all the same)"
            )

    # Perplexity ----------------------------------------------------------------------------------------------------

    def _perplexity(self, engine: OrtEngine, variant: Variant, path: Path, text: str) -> Perplexity:
        with self.stage(f"{variant.name}: perplexity") as stage:
            tokens = self._encode(text, least=0)[: self.sample_tokens]
            if len(tokens) < 2:
                raise ExportError(f"{path} has too little text to measure perplexity on; name a longer one")
            window = min(verify.WINDOW, engine.context, self.seen.max_length)
            start = 0.0 if window in self._references else 0.5
            if window not in self._references:
                self._references[window] = verify.reference_perplexity(self.model, tokens, window, stage.part(0, start))
            reference = self._references[window]
            self._judge_reference(reference, path, stage)
            value = verify.engine_perplexity(engine, tokens, window, share=stage.part(start, 1))
            change = value / reference - 1
            stage.note = f"{value:.3f} against {reference:.3f} in fp32 ({change:+.2%}) over {len(tokens)} tokens of {path.name}"
        if not math.isfinite(value):
            raise UnsupportedModel(f"variant {variant.name!r} gives no finite probabilities; try another precision")
        allowed = verify.MAX_CHANGE.get(variant.precision)
        if self.verifies and allowed is not None and abs(change) > allowed:
            raise UnsupportedModel(
                f"variant {variant.name!r} has a perplexity of {value:.3f} over {path.name} where transformers has "
                f"{reference:.3f} ({change:+.2%}), which is more than rounding; the model does something that the step "
                "contract does not carry. Nothing was published (--no-verify publishes it all the same)"
            )
        return Perplexity(path.name, len(tokens), value, reference)

    def _judge_reference(self, reference: float, path: Path, stage: Stage) -> None:
        """Remark on a model that knows nothing of text, with which its engine will agree. Raises UnsupportedModel."""
        doubt = "its weights may be damaged, or others than its configuration describes"
        if not math.isfinite(reference):
            raise UnsupportedModel(f"transformers' own perplexity over {path.name} is no finite number: {doubt}")
        if reference > _CHANCE * self.vocab:
            stage.notice(
                f"transformers' own perplexity over {path.name} is {reference:.0f}, no better than guessing among the model's "
                f"{self.vocab} tokens: {doubt}"
            )

    def _encode(self, text: str, least: int = 2) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        if len(ids) < least or max(ids, default=0) >= self.vocab:
            raise ExportError(
                f"the tokenizer makes {ids[:8]} of {text[:40]!r}, and the model has {self.vocab} tokens: they do not belong "
                "together, so nothing can be verified; fetch the model's own tokenizer"
            )
        return ids
