"""Random models, and the graphs that `engineshed export --target cuda` makes of a model.

Their weights lie on a grid of 16 levels whose values float16 and bfloat16 hold exactly, so that one model can be compared in
every precision: quantizing it to 4 bits changes no weight.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from export import cuda, decoder, fuse, graph, sampler, verify
from export.cache import Dialect, Layer

_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Graphs:
    """What a GPU engine asks of a `runtime.bundle.Variant`, which needs a package that a bare machine lacks."""

    name: str
    precision: str
    kv_dtype: str
    model: str
    sampler: str
    adorned: str
    layers: tuple[Layer, ...]
    step_bytes: int
    """Bytes of weights that a step of one token reads."""
    size: int
    """Bytes on disk."""
    plan: Any = None
    """A `runtime.bundle.Plan` where `model` is one."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token occupies in a slot, over all layers."""
        width = 4 if self.kv_dtype == "float32" else 2
        return width * sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers)


def llama_1b(layers: int = 16) -> LlamaConfig:
    """The sizes of Llama-3.2-1B: 1.24 billion weights in 16 layers."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=None,
    )


@torch.no_grad()
def random_model(
    config: PretrainedConfig, dtype: torch.dtype, *, spread: float, seed: int = 0, device: str = "cpu"
) -> PreTrainedModel:
    """A model of `config` on the CPU, its matrices drawn on `device`; norms are 1 and biases 0.

    `spread` is about the weights' standard deviation. With the square root of 1 / width a layer adds about as much as there
    is, and answers neither repeat a token nor follow from the last token alone.
    """
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    step = 2.0 ** round(torch.tensor(spread / 4.6).log2().item())  # 4.6: the standard deviation of 0, 1, ... 15
    chance = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            codes = torch.randint(0, 16, parameter.shape, generator=chance, dtype=torch.uint8, device=device)
            parameter.copy_((codes.to(dtype) - 7.5) * step)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    model.eval()
    return model


def survey(model: PreTrainedModel) -> decoder.Survey:
    """See `export.decoder.survey`, which asks for more digits than 16 bits have."""
    return decoder.survey(copy.deepcopy(model).float())


def trace(
    model: PreTrainedModel, seen: decoder.Survey, dialect: Dialect = "onnxruntime", capacity: int | None = None
) -> ir.Model:
    """The step of `model`, on the CPU and in its own dtype, as `export.compile.Compiler` traces it."""
    traced: ir.Model = decoder.trace(decoder.prepare(_sharing(model)), seen, dialect, capacity)
    if dialect == "onnxruntime":
        fuse.fuse(traced)
    return traced


def write(
    traced: ir.Model,
    seen: decoder.Survey,
    folder: Path,
    *,
    dtype: torch.dtype,
    vocab: int,
    target: str = "cuda",
    int4: bool = False,
) -> Graphs:
    """The graphs of a variant for `target`, in the new folder `folder`, out of a `trace`, which is changed."""
    folder.mkdir(parents=True)
    if target == "cuda":
        cuda.finish(traced, vocab, int4=int4)
    else:
        sampler.append_choice(traced, vocab)
    graph.tidy(traced)
    step_bytes = graph.step_bytes(traced)
    graph.write(traced, folder)
    graph.write_whole(sampler.sampling_graph(vocab), folder / graph.SAMPLER)
    graph.write_whole(sampler.sampling_graph(vocab, adorned=True), folder / graph.ADORNED)
    precision = "int4" if int4 else _PRECISIONS[dtype]
    return Graphs(
        name=f"{target}-{precision}",
        precision=precision,
        kv_dtype=str(dtype).removeprefix("torch."),
        model=graph.MODEL,
        sampler=graph.SAMPLER,
        adorned=graph.ADORNED,
        layers=tuple(seen.layers),
        step_bytes=step_bytes,
        size=sum(file.stat().st_size for file in folder.iterdir()),
    )


def on_gpu(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` on the GPU."""
    copied: PreTrainedModel = copy.deepcopy(model).to("cuda")  # type: ignore[arg-type]
    return copied


def judge(model: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]], tie: float) -> verify.Agreement:
    """See `export.verify.compare`; on the device that `model` is on."""
    with torch.device(model.device):
        return verify.compare(model, prompts, answers, tie)


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` over the same weights: what is done to prepare it for tracing leaves the original alone."""
    weights = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(weight): weight for weight in weights})
