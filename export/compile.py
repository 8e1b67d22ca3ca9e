"""One variant: the model's step, traced as its target wants it, and made into the files that the target runs."""

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from export import batches, cuda, decoder, dequantize, fuse, graph, quantize, sampler
from export.cache import Dialect
from export.recipe import CONTEXT, Build
from export.stage import Stages
from export.tensorrt import ADORNED_PLAN, MODEL_PLAN, SAMPLER_PLAN, Builder, Flavour
from runtime import bundle
from runtime.bundle import Plan, Profile, Variant

BITS = {"int8": 8, "int4": 4}
MAX_ROWS = 128
"""Logit rows that a step of a plan gives at most: as many as its largest batch, or as a chunk that is scored."""
_KV_TYPES: dict[torch.dtype, Literal["float32", "float16", "bfloat16"]] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PACKAGES = ("torch", "transformers", "optimum", "onnxscript", "onnx-ir")
_ALIGNMENT = 8
"""Rows that a plan's slots are rounded up to."""


@dataclass
class Compiler:
    """Compiles the variants of one model; each way of tracing it is gone once."""

    model: PreTrainedModel
    seen: decoder.Survey
    vocab: int
    max_length: int
    cache: Path
    """Where TensorRT's timings are kept."""
    stage: Stages
    _traced: dict[tuple[Dialect, torch.dtype, int | None], ir.Model] = field(default_factory=dict)

    def compile(self, build: Build, workshop: Path) -> Variant:
        """Write the files of `build` into its folder in `workshop`. Raises ExportError."""
        folder = workshop / build.name
        folder.mkdir()
        match build.target:
            case "cpu":
                return self._for_cpu(build, workshop, folder)
            case "cuda":
                return self._for_cuda(build, workshop, folder)
            case "tensorrt" | "tensorrt-rtx":
                return self._plan(build, build.target, workshop, folder)

    def _for_cpu(self, build: Build, workshop: Path, folder: Path) -> Variant:
        traced = self._trace("onnxruntime", torch.float32)
        with self.stage(f"{build.name}: compile") as stage:
            report = None
            if build.precision != "fp32":
                report = batches.quantize_both(traced, BITS[build.precision], self.vocab, stage.advance)
            sampler.append_sampler(traced, self.vocab)
            variant = self._written(build, traced, torch.float32, workshop, folder)
            stage.note = _note(variant, report)
        return variant

    def _for_cuda(self, build: Build, workshop: Path, folder: Path) -> Variant:
        dtype = _TYPES.get(build.precision, torch.float16)
        traced = self._trace("onnxruntime", dtype)
        with self.stage(f"{build.name}: compile") as stage:
            report = cuda.finish(traced, self.vocab, int4=build.precision == "int4")
            self._write_samplers(folder)
            variant = self._written(build, traced, dtype, workshop, folder, samplers=(graph.SAMPLER, graph.ADORNED))
            stage.note = _note(variant, report)
        return variant

    def _plan(self, build: Build, flavour: Flavour, workshop: Path, folder: Path) -> Variant:
        builder = Builder(flavour, cache=self.cache)
        capabilities = builder.targets(build.gpus)
        dtype = _TYPES.get(build.precision, torch.float16)
        capacity = plan_rows(build, self.max_length)
        traced = self._trace("tensorrt", dtype, capacity)
        with self.stage(f"{build.name}: compile") as stage:
            report = None
            if build.precision in dequantize.PRECISIONS:
                report = dequantize.quantize_products(traced, build.precision, self.vocab)
            sampler.append_choice(traced, self.vocab)
            self._write_samplers(folder)
            variant = self._written(build, traced, dtype, workshop, folder, samplers=(graph.SAMPLER, graph.ADORNED))
            stage.note = _note(variant, report)
        made = profiles(build, capacity)
        with self.stage(f"{build.name}: build") as stage:
            samplers = folder / graph.SAMPLER, folder / graph.ADORNED
            seen = builder.build_all(
                folder / graph.MODEL,
                samplers,
                folder,
                made,
                capabilities,
                capacity=capacity,
                strip=build.strip,
                share=stage.advance,
            )
            size = (folder / MODEL_PLAN).stat().st_size / 1e6
            stage.note = (
                f"{builder} for {', '.join(capabilities)}: {size:.0f} MB, {len(made)} profiles, "
                f"{seen.layers['KV_CACHE_UPDATE']} slots updated in place, {seen.layers['ATTENTION_INPUT']} attentions"
            )
        plan = Plan(
            builder=flavour,
            version=builder.version,
            compute_capabilities=capabilities,
            capacity=capacity,
            profiles=made,
            stripped=build.strip,
            source=variant.model,
            sampler_source=f"{build.name}/{graph.SAMPLER}",
            adorned_source=f"{build.name}/{graph.ADORNED}",
        )
        files = tuple(bundle.describe(workshop, f"{build.name}/{name}") for name in (MODEL_PLAN, SAMPLER_PLAN, ADORNED_PLAN))
        return msgspec.structs.replace(
            variant,
            model=files[0].path,
            sampler=files[1].path,
            adorned=files[2].path,
            plan=plan,
            files=(*files, *variant.files),
            builder=f"{builder}, {variant.builder}",
        )

    def _trace(self, dialect: Dialect, dtype: torch.dtype, capacity: int | None = None) -> ir.Model:
        """The step as a graph of its own, to be changed."""
        key = dialect, dtype, capacity
        if key not in self._traced:
            name = "trace" if dtype == torch.float32 else f"trace {str(dtype).removeprefix('torch.')}, {dialect}"
            with self.stage(name) as stage:
                traced = decoder.trace(decoder.in_dtype(self.model, dtype), self.seen, dialect, capacity, stage.advance)
                if dialect == "onnxruntime":
                    fuse.fuse(traced)
                self._traced[key] = traced
                stage.note = f"{sum(1 for _ in traced.graph)} operators"
        return self._traced[key].clone()

    def _write_samplers(self, folder: Path) -> None:
        graph.write_whole(sampler.sampling_graph(self.vocab), folder / graph.SAMPLER)
        graph.write_whole(sampler.sampling_graph(self.vocab, adorned=True), folder / graph.ADORNED)

    def _written(
        self, build: Build, model: ir.Model, dtype: torch.dtype, workshop: Path, folder: Path, samplers: tuple[str, ...] = ()
    ) -> Variant:
        graph.tidy(model)
        step_bytes = graph.step_bytes(model)
        graph.write(model, folder)
        names = [graph.MODEL, graph.WEIGHTS, *samplers]
        files = tuple(bundle.describe(workshop, f"{build.name}/{name}") for name in names)
        return Variant(
            name=build.name,
            target=build.target,
            precision=build.precision,
            kv_dtype=_KV_TYPES[dtype],
            model=files[0].path,
            files=files,
            layers=tuple(bundle.Layer(x.index, x.kv_heads, x.key_dim, x.value_dim) for x in self.seen.layers),
            builder=", ".join(f"{name} {version(name)}" for name in PACKAGES),
            attention=_attention(self.seen),
            length_boundaries=self.seen.length_boundaries,
            opset=graph.OPSET,
            step_bytes=step_bytes,
            sampler=files[2].path if samplers else None,
            adorned=files[3].path if samplers else None,
        )


def plan_rows(build: Build, max_length: int) -> int:
    """Rows of a plan's slots: the tokens of `build`, and one more, which rows that only fill a batch up may write to."""
    context = min(max_length, CONTEXT) if build.context is None else build.context
    return -(-(context + 1) // _ALIGNMENT) * _ALIGNMENT


def profiles(build: Build, capacity: int) -> tuple[Profile, ...]:
    """Decode batches from the smallest up, then a prompt's chunk, which is shorter than a slot."""
    decode = [Profile(batch, 1, batch) for batch in sorted(set(build.batches))]
    chunk = min(build.chunk, capacity - _ALIGNMENT)
    return (*decode, Profile(1, chunk, min(chunk, MAX_ROWS)))


def _note(variant: Variant, report: quantize.Report | None = None) -> str:
    note = f"{variant.size / 1e6:.0f} MB"
    if report is not None:
        note += f", {report.weights / 1e6:.0f}M weights quantized"
        if report.blocks:
            note += f", {report.carried_share:.0%} of their blocks carried over"
    return note


def _attention(seen: decoder.Survey) -> Literal["fused", "explicit", "mixed"]:
    fused = sum(layer.fused for layer in seen.layers)
    return "fused" if fused == len(seen.layers) else "mixed" if fused else "explicit"
