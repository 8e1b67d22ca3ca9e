"""The whole way from a recipe to a published bundle."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import msgspec
from transformers import PreTrainedModel

from export import decoder, greedy, positions, publish, sampling, sentence, source, tokenizer, tools, verify
from export import far as far_rows
from export.compile import Compiler
from export.embeddings import EmbeddingJob
from export.errors import ExportError, UnsupportedModel
from export.recipe import Build, Recipe
from runtime import bundle
from runtime.bundle import Bundle, Perplexity, SamplingDefaults, ToolFormat, Variant, Verification
from runtime.engine import EngineError
from runtime.ort import OrtEngine

MAX_LONG_PROMPTS = 6
"""Prompts that verify past lengths of the configuration, at the most."""
LEAST_AGREEMENT = 0.5
"""Share of greedy tokens below which a quantized variant is taken for broken rather than for coarse."""


class Progress(Protocol):
    """Who is told how far the export is."""

    def begin(self, stage: str) -> None:
        """A stage has begun."""

    def advance(self, stage: str, share: float) -> None:
        """So much of it is done, from 0 to 1; not every stage tells."""

    def end(self, stage: str, seconds: float, note: str) -> None:
        """It is over; `note` says what came of it."""

    def notice(self, sentence: str) -> None:
        """Tell whoever exports what they should know, whatever else is shown."""


@dataclass
class Stage:
    """A stage under way; what is put into `note` is shown at its end."""

    name: str
    progress: Progress
    note: str = ""

    done: float = 0.0
    """The largest share that was told."""

    def advance(self, share: float) -> None:
        """Tell how much of it is done, from 0 to 1; less than was told before is not passed on."""
        self.done = min(max(self.done, share), 1.0)
        self.progress.advance(self.name, self.done)

    def part(self, start: float, end: float) -> Callable[[float], None]:
        """Takes the share of a part of the stage, which begins and ends at these shares of the whole."""
        return lambda share: self.advance(start + (end - start) * share)

    def notice(self, sentence: str) -> None:
        """Tell whoever exports what they should know of it."""
        self.progress.notice(sentence)


@dataclass
class Export:
    """How to export, beside what."""

    engines: Path
    """Where bundles live."""
    cache: Path
    """Where downloaded wheels are unpacked."""
    progress: Progress
    verify: bool = True
    text: Path | None = None
    """Perplexity is measured on this file; None measures none."""
    text_tokens: int = 2048
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, recipe: Recipe) -> Path:
        """Build the bundle of `recipe` and publish it at `engines/NAME`; returns that folder. Raises ExportError.

        Nothing is left behind when it fails, and an older bundle of that name stays as it was. Variants that the older
        bundle has and the recipe does not are kept when both come from the same weights.
        """
        publish.check_writable(self.engines)
        sample = None if self.text is None else _read(self.text)
        template = None if recipe.chat_template is None else tokenizer.read_template(Path(recipe.chat_template))
        with self._stage("fetch") as stage:
            checkpoint = source.fetch(recipe.model, self.cache, trust_remote_code=recipe.trust_remote_code, share=stage.advance)
            stage.note = f"{checkpoint.source.kind} {checkpoint.source.name}"
        with self._stage("load") as stage:
            lines: list[str] = []
            model = source.load(
                checkpoint, recipe.task, trust_remote_code=recipe.trust_remote_code, notes=lines, share=stage.advance
            )
            stage.note = f"{model.config.model_type}, {model.num_parameters() / 1e6:.0f}M parameters"
        for line in lines:
            self.progress.notice(line)
        text, written, authors = self._text_side(recipe, checkpoint, model, template)
        folder = self.engines / recipe.name
        with publish.workshop(self.engines, recipe.name) as workshop:
            job: _Job | EmbeddingJob
            if recipe.task == "feature-extraction":
                use = sentence.read(checkpoint.folder, recipe.pooling)
                text = tokenizer.for_embeddings(text, lower=use.lower)
                job = EmbeddingJob(
                    model, use, workshop, self._stage, self.verify, lambda words: text.tokenizer.encode(words).ids
                )
            else:
                with self._stage("survey") as stage:
                    seen = decoder.survey(model, recipe.max_length)
                    stage.note = _survey_note(seen)
                job = _Job(self, model, seen, workshop, text, sample)
            texts = tokenizer.write_text(text, workshop)
            variants = tuple(job.build(build) for build in recipe.variants)
            manifest = Bundle(
                format=bundle.FORMAT,
                name=recipe.name,
                source=checkpoint.source,
                architecture=model.config.model_type,
                vocab_size=job.vocab,
                max_length=job.max_length,
                stop_ids=text.stop_ids,
                special_tokens=dict(text.special_tokens),
                files=tuple(bundle.describe(workshop, name) for name in texts),
                variants=variants,
                created=int(time.time()),
                tools=written,
                task=recipe.task,
                sampling=authors,
                pooling=job.sentence.pooling if isinstance(job, EmbeddingJob) else None,
                encoder=job.encoder if isinstance(job, EmbeddingJob) else None,
            )
            kept = publish.keep_variants(folder, workshop, manifest)
            manifest = msgspec.structs.replace(manifest, variants=(*variants, *kept))
            with self._stage("publish") as stage:
                (workshop / bundle.MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
                bundle.read(workshop)
                publish.replace(folder, workshop)
                stage.note = str(folder)
        return folder

    def _text_side(
        self, recipe: Recipe, checkpoint: source.Checkpoint, model: PreTrainedModel, template: str | None
    ) -> tuple[tokenizer.TextSide, ToolFormat | None, SamplingDefaults]:
        """How the model reads and writes text and calls of tools, and the sampling where a request says nothing of it."""
        with self._stage("tokenizer") as stage:
            text = tokenizer.read_text(
                checkpoint.folder,
                checkpoint.gguf_file,
                generation_config=getattr(model, "generation_config", None),
                choice=recipe.tokenizer,
                template=template,
                trust_remote_code=recipe.trust_remote_code,
            )
            written = tools.detect(text) if recipe.tools is None else tools.named(recipe.tools)
            authors, notes = SamplingDefaults(), text.notes
            if recipe.task == "text-generation":
                published, more = sampling.read_sampling(checkpoint.folder, checkpoint.gguf_file)
                authors, notes = recipe.sampling.over(published), (*notes, *more)
            else:
                text = replace(text, templates={})
            text = tokenizer.checked(text, _embeddings(model), checkpoint.path)
            said = [f"{text.tokenizer.get_vocab_size()} tokens", _named(text.templates)]
            said += [f"{written}'s tool calls"] if written else []
            stage.note = ", ".join(filter(None, [*said, sampling.described(authors)]))
            for note in notes:
                stage.notice(note)
        return text, written, authors

    @contextmanager
    def _stage(self, name: str) -> Iterator[Stage]:
        start, stage = time.perf_counter(), Stage(name, self.progress)
        self.progress.begin(name)
        yield stage
        self.seconds[name] = time.perf_counter() - start
        self.progress.end(name, self.seconds[name], stage.note)


@dataclass
class _Job:
    """What building the variants of one model shares."""

    export: Export
    model: PreTrainedModel
    seen: decoder.Survey
    workshop: Path
    text: tokenizer.TextSide
    sample: str | None
    """What perplexity is measured on."""

    def __post_init__(self) -> None:
        self.vocab = int(self.model.get_output_embeddings().weight.shape[0])
        self.max_length = self.seen.max_length
        self._reference: float | None = None
        self._compiler = Compiler(
            self.model, self.seen, self.vocab, self.max_length, self.export.cache.with_name("tensorrt"), self.export._stage
        )

    def build(self, build: Build) -> Variant:
        """Compile one variant into its folder and prove it."""
        return self._proved(self._compiler.compile(build, self.workshop))

    def _proved(self, variant: Variant) -> Variant:
        if not self.export.verify and self.export.text is None:
            return variant
        if variant.kv_dtype == "bfloat16":
            with self.export._stage(f"{variant.name}: verify") as stage:
                stage.note = "left out: ONNX Runtime has no bfloat16 kernels for the CPU"
            return variant
        far = self._far_rows()
        context = min(self.max_length, max(verify.WINDOW, *self._long_rows(), *far))
        graph = variant
        if variant.plan is not None:  # whose ONNX says the same as the plan, and runs here
            context, graph = variant.plan.capacity, msgspec.structs.replace(variant, model=variant.plan.source)
        try:
            engine = OrtEngine(self.workshop, graph, self.vocab, slots=len(verify.PROMPTS), context=context)
        except EngineError as error:
            raise ExportError(f"variant {variant.name!r} was compiled but cannot be run here: {error}") from error
        try:
            if self.export.verify:
                variant = msgspec.structs.replace(variant, verification=self._verify(engine, variant, far))
            if self.export.text is not None and self.sample is not None:
                perplexity = self._perplexity(engine, variant, self.export.text, self.sample)
                variant = msgspec.structs.replace(variant, perplexity=perplexity)
        except EngineError as error:
            raise UnsupportedModel(f"variant {variant.name!r} was compiled but fails when it runs: {error}") from error
        finally:
            engine.close()
        return variant

    def _verify(self, engine: OrtEngine, variant: Variant, far: tuple[int, ...]) -> Verification:
        tie = verify.TIES.get(variant.precision, verify.TIE)
        with self.export._stage(f"{variant.name}: verify") as stage:
            count = min(verify.TOKENS, engine.context // 2)
            prompts = self._prompts(engine.context - count, count)
            end = 0.6 if far else 1.0
            answers = greedy.answer(engine, prompts, count, verify.CHUNK, stage.part(0, end / 2))
            boundaries, judged = self.seen.length_boundaries, stage.part(end / 2, end)
            agreement = verify.compare(self.model, prompts, answers, tie, boundaries, judged)
            longest = max(map(len, prompts)) + count
            self._judge(variant, agreement)
            for number, length in enumerate(length for length in far if length <= engine.context):
                stage.part(end, 1)(number / len(far))
                coarse = tie if variant.precision in verify.TIES else verify.COARSE_TIE
                found = far_rows.compare(engine, self.model, self.seen, length, coarse)
                if found is not None:
                    self._judge_far(variant, found, length)
                    longest = max(longest, length)
            stage.note = f"{agreement.equal} of {agreement.compared} greedy tokens are transformers'"
            if agreement.ties:
                stage.note += f", {agreement.ties} tied"
            stage.note += f", in rows of up to {longest} tokens"
        return Verification(
            f"transformers {version('transformers')}, fp32",
            len(prompts),
            agreement.compared,
            agreement.equal + agreement.ties,
            longest=longest,
        )

    def _prompts(self, room: int, answer: int) -> list[list[int]]:
        """Prompts of at most `room` tokens: the texts, and the same words one after another past lengths of the
        configuration.
        """
        texts = [self._encode(text) for text in verify.PROMPTS]
        words = list(itertools.chain.from_iterable(texts))
        around = [size for length in self._long_rows() for size in (length - answer // 2, length + 3)]
        sizes = sorted({min(size, room) for size in around if size > max(map(len, texts))})[-MAX_LONG_PROMPTS:]
        long = [(words * (size // len(words) + 1))[:size] for size in sizes]
        return [text[:room] for text in texts] + long

    def _long_rows(self) -> tuple[int, ...]:
        """Lengths of the model's configuration, and its last one, as far as rows of them can be computed as a whole."""
        config = self.model.config.get_text_config(decoder=True)
        lengths = {*positions.configured_lengths(config, self.max_length), *self.seen.length_boundaries, self.max_length}
        return tuple(sorted(length for length in lengths if positions.affordable(self.model, length)))

    def _far_rows(self) -> tuple[int, ...]:
        """Of the lengths where something may change, those of rows over a past that must be made up."""
        lengths = positions.row_lengths(self.model.config.get_text_config(decoder=True), self.max_length)
        kept = positions.within_memory(self.model, self.seen, lengths)
        return tuple(length for length in kept if not positions.affordable(self.model, length))

    def _judge_far(self, variant: Variant, found: verify.Agreement, length: int) -> None:
        if found.different:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: at the end of a row of {length} tokens the engine's tokens differ from "
                f"transformers' in {found.different} of {found.compared} places ({found.first}). Nothing was published "
                f"(--max-length {length - 1} or less may leave the difference out; --no-verify publishes it all the same)"
            )

    def _judge(self, variant: Variant, agreement: verify.Agreement) -> None:
        name = type(self.model).__name__
        if variant.precision in verify.TIES and agreement.different:
            raise UnsupportedModel(
                f"{name}: the engine's tokens differ from transformers' in {agreement.different} of {agreement.compared} "
                f"places ({agreement.first}); the model does something that the step contract does not carry. "
                "Nothing was published (--no-verify publishes it all the same)"
            )
        if agreement.different > (1 - LEAST_AGREEMENT) * agreement.compared:
            raise UnsupportedModel(
                f"{name} in {variant.precision}: only {agreement.equal} of {agreement.compared} greedy tokens are "
                f"transformers' own ({agreement.first}); try another precision (--no-verify publishes it all the same)"
            )

    def _perplexity(self, engine: OrtEngine, variant: Variant, path: Path, sample: str) -> Perplexity:
        with self.export._stage(f"{variant.name}: perplexity") as stage:
            tokens = self._encode(sample, least=0)[: self.export.text_tokens]
            if len(tokens) < 2:
                raise ExportError(f"{path} has too little text to measure perplexity on; name a longer one")
            window = min(verify.WINDOW, engine.context)
            start = 0.5 if self._reference is None else 0.0
            if self._reference is None:
                self._reference = verify.reference_perplexity(self.model, tokens, window, stage.part(0, start))
            value = verify.engine_perplexity(engine, tokens, window, share=stage.part(start, 1))
            change = value / self._reference - 1
            stage.note = (
                f"{value:.3f} against {self._reference:.3f} in fp32 ({change:+.2%}) over {len(tokens)} tokens of {path.name}"
            )
        if not math.isfinite(value):
            raise UnsupportedModel(f"variant {variant.name!r} gives no finite probabilities; try another precision")
        allowed = verify.MAX_CHANGE.get(variant.precision)
        if self.export.verify and allowed is not None and abs(change) > allowed:
            raise UnsupportedModel(
                f"variant {variant.name!r} has a perplexity of {value:.3f} over {path.name} where transformers has "
                f"{self._reference:.3f} ({change:+.2%}), which is more than rounding; the model does something that the step "
                "contract does not carry. Nothing was published (--no-verify publishes it all the same)"
            )
        return Perplexity(path.name, len(tokens), value, self._reference)

    def _encode(self, text: str, least: int = 2) -> list[int]:
        ids = self.text.tokenizer.encode(text).ids
        if len(ids) < least or max(ids, default=0) >= self.vocab:
            raise ExportError(
                f"the tokenizer makes {ids[:8]} of {text[:40]!r}, and the model has {self.vocab} tokens: they do not belong "
                "together, so nothing can be verified; fetch the model's own tokenizer"
            )
        return ids


def _survey_note(seen: decoder.Survey) -> str:
    fused = sum(layer.fused for layer in seen.layers)
    note = f"{len(seen.layers)} layers, {fused} with fused attention, rows of up to {seen.checked_length} tokens compared"
    for boundary in seen.length_boundaries:
        note += f"; rows longer than {boundary} are computed with other factors"
    return note


def _embeddings(model: PreTrainedModel) -> int:
    """How many tokens the model has: ids are below it."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(int(table.weight.shape[0]) for table in tables if table is not None)  # type: ignore[index]


def _named(templates: Mapping[str, str]) -> str:
    if not templates:
        return "no chat template"
    return "a chat template" if len(templates) == 1 else f"chat templates {', '.join(templates)}"


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{text} cannot be read, to measure perplexity on: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{text} is no UTF-8 text, to measure perplexity on: {error}") from error
