"""A tiny Llama with random weights, saved as a Hugging Face folder, and its bundle: quick to make, real all the way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from gguf import GGMLQuantizationType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from export import decoder
from export.cache import Dialect
from export.pipeline import Export
from export.recipe import Build, ModelReference, Recipe

Matrix = npt.NDArray[np.float32]

TEXT = Path(__file__).parent / "data" / "perplexity.txt"
NAME = "tiny"
BUILDS = (Build("cpu", "fp32"), Build("cpu", "int4"))
VOCAB = 512
POSITIONS = 512
SPREAD = 0.2
"""Standard deviation of weights; at the usual 0.02 a tiny model repeats one token whatever came before."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Silent:
    """A `stage.Progress` that shows nothing and remembers what it was told."""

    notes: dict[str, str] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def begin(self, stage: str) -> None:
        self.begun.append(stage)

    def advance(self, stage: str, share: float) -> None:
        self.shares.setdefault(stage, []).append(share)

    def end(self, stage: str, seconds: float, note: str) -> None:
        self.notes[stage] = note

    def notice(self, sentence: str) -> None:
        self.notices.append(sentence)


def tokenizer() -> Tokenizer:
    """Byte-level BPE of `VOCAB` tokens, trained on the perplexity text; the first three are special."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT.read_text().splitlines(), trainer)
    return made


def configuration() -> LlamaConfig:
    """Two layers of Llama with grouped heads and a tied LM head."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=None,
        tie_word_embeddings=True,
    )


def random_model(seed: int = 0) -> LlamaForCausalLM:
    """The model, the same for the same seed; its matrices lie on GGUF's grids, as the default model's do."""
    torch.manual_seed(seed)
    model: LlamaForCausalLM = LlamaForCausalLM(configuration()).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * SPREAD
            if parameter.dim() > 1:
                kind = GGMLQuantizationType.Q8_0 if "embed" in name else GGMLQuantizationType.Q4_1
                parameter.copy_(torch.from_numpy(on_grid(noise.numpy(), kind)))
            else:
                parameter.add_(noise)
    return model


def on_grid(matrix: Matrix, kind: GGMLQuantizationType) -> Matrix:
    """`matrix` quantized as a GGUF holds it, and read back."""
    back: Matrix = gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind)
    return back


def write_model(folder: Path) -> Path:
    """Save the model, its tokenizer and its chat template to `folder`; the same bytes every time."""
    random_model().save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), bos_token=SPECIAL[0], eos_token=SPECIAL[2], chat_template=TEMPLATE
    )
    wrapped.save_pretrained(folder)
    return folder


@contextmanager
def tracing_once() -> Iterator[None]:
    """While this lasts, the tiny model is traced at its first export, and the graph of that serves the others.

    Tracing is most of an export's time, and depends on nothing but the model's code.
    """
    real = decoder.trace

    def remembered(
        model: PreTrainedModel,
        seen: decoder.Survey,
        dialect: Dialect = "onnxruntime",
        capacity: int | None = None,
        share: Callable[[float], None] = lambda share: None,
    ) -> ir.Model:
        key = model.dtype, dialect, capacity
        if key not in _traced:
            _traced[key] = real(model, seen, dialect, capacity, share)
        return _traced[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "trace", remembered)
        yield


_traced: dict[tuple[torch.dtype, Dialect, int | None], ir.Model] = {}


def recipe(model: Path, *builds: Build) -> Recipe:
    """The recipe that exports the folder `model`, in `BUILDS` if no other are named."""
    return Recipe(NAME, ModelReference(path=str(model)), builds or BUILDS)


def exporting(engines: Path, *, verify: bool = True, text: Path | None = None, progress: Silent | None = None) -> Export:
    """An export into `engines` that shows nothing."""
    return Export(engines, engines.parent / "cache", progress or Silent(), verify=verify, text=text, text_tokens=600)
