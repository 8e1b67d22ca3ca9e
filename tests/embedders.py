"""Tiny random models for embeddings of several architectures, as Hugging Face folders with sentence-transformers' files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import processors
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from export.recipe import Build, ModelReference, Recipe
from runtime.bundle import Pooling
from tests import tiny

HEADS, WIDTH, POSITIONS = 4, 64, 128
_SPREAD = 0.15
_SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
TYPES: dict[str, tuple[dict[str, Any], Pooling]] = {
    "bert": ({}, "cls"),
    "roberta": ({}, "mean"),
    "mpnet": ({}, "mean"),
    "xlm-roberta": ({}, "mean"),
    "distilbert": ({"dim": WIDTH, "n_heads": HEADS, "hidden_dim": 96, "n_layers": 2}, "mean"),
    "modernbert": ({"local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 2}, "mean"),
    "nomic_bert": ({}, "mean"),
    "qwen3": ({"num_key_value_heads": 2, "head_dim": 16}, "last"),
    "mistral": ({"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}, "last"),
    "gemma3_text": (
        {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16, "use_bidirectional_attention": True},
        "mean",
    ),
    "phi3": (
        {
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 40,
                "short_factor": [1 + 0.1 * i for i in range(WIDTH // HEADS // 2)],
                "long_factor": [1.5 + 0.5 * i for i in range(WIDTH // HEADS // 2)],
            },
        },
        "last",
    ),
}
"""By transformers' model type: what its configuration needs beyond the sizes, and how its embeddings are pooled."""
OFFSET = {"roberta": 2, "mpnet": 2, "xlm-roberta": 2}
"""Positions that a type's table has and no token can use."""


def random_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A model of the type `kind`, the same for the same seed."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**_SIZES, **TYPES[kind][0])
    model: PreTrainedModel = AutoModel.from_config(config, attn_implementation="eager").eval().float()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter) * _SPREAD
        parameter.data = noise if parameter.dim() > 1 else parameter.data + noise / 2
    return model


def write_model(folder: Path, kind: str, *, normalized: bool = True, most: int | None = None, files: bool = True) -> Path:
    """Save the model of type `kind` and its tokenizer to `folder`; with `files`, also sentence-transformers' files."""
    random_model(kind).save_pretrained(folder)
    made = tiny.tokenizer()
    around = "$A <|im_end|>" if TYPES[kind][1] == "last" else "<|endoftext|> $A <|im_end|>"
    ids = [(token, made.token_to_id(token)) for token in tiny.SPECIAL]
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=tiny.SPECIAL[0], eos_token=tiny.SPECIAL[2])
    wrapped.save_pretrained(folder)
    if files:
        write_sentence_files(folder, TYPES[kind][1], normalized=normalized, most=most)
    return folder


def write_sentence_files(folder: Path, pooling: str, *, normalized: bool, most: int | None) -> None:
    """`modules.json` and what it names, as sentence-transformers writes them."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalized else [])]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    flags = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
    (folder / "1_Pooling").mkdir()
    config = {
        "word_embedding_dimension": WIDTH,
        **{flag: name == pooling for name, flag in flags.items()},
        "include_prompt": True,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if most is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": most, "do_lower_case": False}))


def recipe(model: Path, *builds: Build, name: str = "tiny-embedder", pooling: Pooling | None = None) -> Recipe:
    """The recipe that exports the folder `model` for embeddings, in float32 if nothing else is named."""
    return Recipe(name, ModelReference(path=str(model)), builds or (Build("cpu", "fp32"),), None, "feature-extraction", pooling)


@torch.no_grad()
def by_hand(model: PreTrainedModel, pooling: Pooling, tokens: list[int], *, normalized: bool = True) -> npt.NDArray[np.float32]:
    """The embedding of one text through transformers alone, pooled here."""
    hidden = model(input_ids=torch.tensor([tokens])).last_hidden_state[0].numpy()
    pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    result: npt.NDArray[np.float32] = pooled / np.linalg.norm(pooled) if normalized else pooled
    return result
