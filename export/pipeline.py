"""The whole way from a recipe to a published bundle."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
from transformers import PreTrainedModel

from export import decoder, paths, publish, sampling, sentence, source, tokenizer, tools
from export.compile import Compiler
from export.embeddings import EmbeddingJob
from export.errors import ExportError
from export.proof import Proof
from export.recipe import Build, Recipe
from export.stage import Progress, Stage
from runtime import bundle
from runtime.bundle import Bundle, SamplingDefaults, ToolFormat, Variant


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
        given = None if recipe.model.path is None else paths.expanded(recipe.model.path)
        publish.check_writable(self.engines, recipe.name, given)
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
                job, text = self._embedding_job(recipe, checkpoint, model, workshop, text)
            else:
                job = self._job(recipe, model, workshop, text, sample)
                text = replace(text, stop_ids=job.stop_ids)
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
                publish.replace(folder, workshop, checkpoint.path)
                stage.note = str(folder)
        return folder

    def _job(
        self, recipe: Recipe, model: PreTrainedModel, workshop: Path, text: tokenizer.TextSide, sample: str | None
    ) -> "_Job":
        with self._stage("survey") as stage:
            seen = decoder.survey(model, recipe.max_length)
            stage.note = _survey_note(seen)
            for notice in _unseen(seen):
                stage.notice(notice)
        return _Job(self, model, seen, workshop, text, sample)

    def _embedding_job(
        self, recipe: Recipe, checkpoint: source.Checkpoint, model: PreTrainedModel, workshop: Path, text: tokenizer.TextSide
    ) -> tuple[EmbeddingJob, tokenizer.TextSide]:
        """The job, and the text side as `sentence` wants it."""
        use = sentence.read(checkpoint.folder, recipe.pooling)
        text = tokenizer.for_embeddings(text, lower=use.lower)

        def tokenize(words: str) -> list[int]:
            ids: list[int] = text.tokenizer.encode(words).ids
            return ids

        return EmbeddingJob(model, use, workshop, self._stage, self.verify, tokenize, recipe.max_length), text

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
                text = tokenizer.checked(text, _embeddings(model), checkpoint.path)
                published, more = sampling.read_sampling(checkpoint.folder, checkpoint.gguf_file)
                authors, notes = recipe.sampling.over(published), (*text.notes, *more)
            else:
                text = tokenizer.checked(replace(text, templates={}), _embeddings(model), checkpoint.path)
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
        export, seen = self.export, self.seen
        self.vocab = int(self.model.get_output_embeddings().weight.shape[0])
        self.max_length = seen.max_length
        ends = self.text.stop_ids
        self.stop_ids = ends if seen.padding is None or seen.padding in ends else (*ends, seen.padding)
        timings = export.cache.with_name("tensorrt")
        self._compiler = Compiler(self.model, seen, self.vocab, self.max_length, timings, export._stage)
        self._proof = Proof(
            self.model,
            seen,
            self.vocab,
            self.workshop,
            self.text.tokenizer,
            export._stage,
            export.verify,
            None if export.text is None or self.sample is None else (export.text, self.sample),
            export.text_tokens,
        )

    def build(self, build: Build) -> Variant:
        """Compile one variant into its folder and prove it."""
        return self._proof.of(self._compiler.compile(build, self.workshop))


def _unseen(seen: decoder.Survey) -> Iterator[str]:
    """What whoever exports should know of rows that were not compared."""
    if seen.padding is not None:
        yield (
            f"the model takes its padding token ({seen.padding}) for none at all where it counts positions, so an answer ends "
            "with one; leave it out of prompts"
        )
    if seen.named_beyond is not None and seen.named_beyond > seen.max_length:
        yield (
            f"the bundle takes {seen.max_length} tokens: rows longer than that could not be compared here, and the model's "
            f"configuration says that something changes at {seen.named_beyond} (--max-length takes more all the same; more "
            "memory compares more)"
        )
    elif seen.checked_length < seen.max_length:
        says = "names no length between the two"
        if seen.named_beyond is not None:
            says = f"says that something changes at {seen.named_beyond}"
        yield (
            f"rows of more than {seen.checked_length} of {seen.max_length} tokens were not compared, for want of memory; the "
            f"model's configuration {says}"
        )


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
