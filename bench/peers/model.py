"""Write a recipe's model as the peers' converters read it: `python -m bench.peers.model FOLDER`.

FOLDER becomes a Hugging Face folder in float32 with its tokenizer; a GGUF that the recipe names is copied beside it, as
`model.gguf`. So every peer computes the same weights. `source.json` says which, by their hash.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from export import recipe, source, tokenizer
from export.errors import ExportError


def write(recipe_file: Path, cache: Path, folder: Path) -> None:
    """Fetch, load and save. Raises ExportError."""
    checkpoint = source.fetch(recipe.read(recipe_file).model, cache)
    model = source.load(checkpoint)
    text = tokenizer.read_text(checkpoint.folder, checkpoint.gguf_file)
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.gguf_file is not None:  # its weights are float32 by now, but transformers still takes them for blocks
        del model.hf_quantizer
        del model.config.quantization_config
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=text.tokenizer, chat_template=dict(text.templates)).save_pretrained(folder)
    if checkpoint.gguf_file is not None:
        shutil.copyfile(checkpoint.path, folder / "model.gguf")
    (folder / "source.json").write_text(json.dumps({"sha256": checkpoint.source.sha256}))


def main() -> int:
    """The command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="bench.peers.model", description="Save a recipe's model for the peers of the bench.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", type=Path, default=Path("engines/smollm2-135m-instruct.toml"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/models"))
    arguments = parser.parse_args()
    try:
        write(arguments.recipe, arguments.cache, arguments.folder)
    except ExportError as error:
        print(f"bench.peers.model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
