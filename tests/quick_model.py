"""A stand-in for the default model that answers some ten times as fast: `python -m tests.quick_model FOLDER`.

It has the default model's name, tokenizer, chat template, sampling and length, two small layers of random weights, and says any
words. With the variable TEST_ENGINES=FOLDER the tests of the server run over it, as on a machine ten times as fast:
`make test-quick`.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from export.recipe import Build, ModelReference, Recipe
from runtime import bundle
from runtime.bundle import TEMPLATE, TOKENIZER
from tests import tiny
from tests.default_model import MODEL, PUBLISHED


def write_model(folder: Path) -> None:
    """Save the model to `folder` in Hugging Face's layout. What it says are words of ASCII: all else has a logit of 0."""
    manifest = bundle.read(PUBLISHED / MODEL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(PUBLISHED / MODEL / TOKENIZER),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=(PUBLISHED / MODEL / TEMPLATE).read_text(),
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=manifest.vocab_size,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=manifest.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=manifest.stop_ids[0],
            tie_word_embeddings=False,
        )
    ).float()
    words = [
        token.startswith("Ġ") and token[1:].isascii() and token[1:].isalpha()
        for token in tokenizer.convert_ids_to_tokens(list(range(manifest.vocab_size)))
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * tiny.SPREAD)
        model.lm_head.weight[~torch.tensor(words)] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    """Build the bundle `FOLDER/NAME`."""
    parser = argparse.ArgumentParser(prog="tests.quick_model", description="Build a quick stand-in for the default model.")
    parser.add_argument("folder", type=Path, help="folder for its bundle")
    folder = parser.parse_args().folder
    with TemporaryDirectory() as temporary:
        write_model(Path(temporary) / "model")
        # In four bits, the near ties of random weights would be decided by who shares the batch.
        reference, sampling = ModelReference(path=str(Path(temporary) / "model")), bundle.read(PUBLISHED / MODEL).sampling
        recipe = Recipe(MODEL, reference, (Build("cpu", "fp32"),), sampling=sampling)
        tiny.exporting(folder, verify=False).run(recipe)
    print(folder / MODEL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
