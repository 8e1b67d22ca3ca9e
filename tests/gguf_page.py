"""docs/gguf.md, made from the tables in export/gguf_metadata.py and export/gguf_model.py: `python -m tests.gguf_page`."""

import textwrap
from pathlib import Path

from export import gguf_metadata, gguf_model
from export.splits import SPLITS

WIDTH = 128
"""Characters of a line of prose."""
PAGE = Path(__file__).parents[1] / "docs" / "gguf.md"

HEAD = """# GGUF files

`engineshed export model.gguf` reads a GGUF's metadata and tensors itself: every key has one of the fates below, every tensor a
place in the model, and a file that says more is refused with the name of what it says. A file in parts
(`NAME-00001-of-00003.gguf`) is named by any of them; all have to be in one folder, and on the hub all are fetched.

{architectures}

For each kind of them, for every kind of position scaling, and for the scales, soft caps, windows and experts, `make test`
compares the tokens of a tiny file with those that llama.cpp itself gave (tests/data/gguf_tokens.json). Others are refused:
export the original model's folder.

{vocabularies}

Two things are decided by the weights, as in llama.cpp: a file without `output.weight` has the embedding as its LM head, and
biases are there where their tensors are. `rope_freqs.weight` (Llama 3.1 and later) divides the rotation's frequencies;
`rope_factors_long.weight` and `rope_factors_short.weight` are longrope's.

## Metadata

*carried*: into the configuration or the tokenizer. *compared*: with what the model computes, refused where it differs.
*refused*: unless the value is one that says nothing. *noted*: left out, and whoever exports is told. A key of the
architecture's namespace or of the tokenizer's that is not in this table is refused, as it may change the tokens; so is one that
is carried in another architecture only.

| key | fate | |
| --- | --- | --- |
"""


def page() -> str:
    """The whole page."""
    names = f"Read are the architectures {', '.join(sorted(gguf_model.ARCHITECTURES))}."
    rows = [(f"{{arch}}.{key}", fate) for key, fate in gguf_metadata.ARCHITECTURE.items()]
    rows += [(f"tokenizer.{key}", fate) for key, fate in gguf_metadata.TOKENIZER.items()]
    rows += list(gguf_metadata.OTHERS.items())
    lines = []
    for key, fate in rows:
        silent = f"; says nothing as {' or '.join(f'{value:g}' for value in fate.neutral)}" if fate.neutral else ""
        lines.append(f"| `{key}` | {fate.kind} | {fate.note}{silent} |")
    vocabularies = (
        "Vocabularies are bytes (`gpt2`), SentencePiece's (`llama`) and gemma4's. The rule by which bytes are split before "
        "they are merged is a name in the file (`tokenizer.ggml.pre`); known are "
        f"{', '.join(sorted(SPLITS))}. A file with another is refused, as a wrong one costs quality that nobody sees; "
        "`--tokenizer transformers` takes what transformers makes of it."
    )
    wrapped = {
        "architectures": textwrap.fill(names, WIDTH, break_on_hyphens=False),
        "vocabularies": textwrap.fill(vocabularies, WIDTH, break_on_hyphens=False),
    }
    return HEAD.format(**wrapped) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
