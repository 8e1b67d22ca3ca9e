"""Write gguf_tokens.json: llama.cpp's greedy tokens for the tiny GGUF files of tests/tiny_gguf.py.

Run outside this project's environment, where llama-cpp-python and gguf are installed (the former compiles for minutes):

    PYTHONPATH=. python tests/data/make_gguf_tokens.py [KIND ...]

Kinds that are named are made anew and the others kept. Everything is in float32, cache included. Of the prompts of a length
the first is taken after which llama.cpp never has to choose between two logits that rounding could swap.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

from tests import tiny_gguf

OUT = Path(__file__).with_name("gguf_tokens.json")
GAP = 4e-3
"""Between the two best logits, as a part of the row's spread."""
SALTS = 200


def main() -> None:
    chosen = sys.argv[1:] or list(tiny_gguf.KINDS)
    kinds: dict[str, list[dict[str, Any]]] = json.loads(OUT.read_text())["kinds"] if OUT.exists() else {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            path = tiny_gguf.write(name, Path(folder) / f"{name}.gguf")
            kinds[name] = [record(path, prompt) for prompt in tiny_gguf.KINDS[name].prompts]
        print(name, [case["gap"] for case in kinds[name]], flush=True)
    lines = [
        f'"{name}": [\n' + ",\n".join(json.dumps(case) for case in kinds[name]) + "\n]"
        for name in tiny_gguf.KINDS
        if name in kinds
    ]
    made_by = f"{Path(__file__).name}, llama-cpp-python {llama_cpp.__version__}"
    OUT.write_text(f'{{"made_by": "{made_by}", "kinds": {{\n' + ",\n".join(lines) + "\n}}\n")


def record(path: Path, prompt: tiny_gguf.Prompt) -> dict[str, Any]:
    """A prompt that leaves no choice to rounding, its tokens, and the best logit of each step."""
    model = llama_cpp.Llama(
        str(path),
        n_ctx=prompt.context,
        n_batch=prompt.context,
        n_ubatch=prompt.context,
        n_threads=2,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    for salt in range(SALTS):
        ids = prompt.ids(salt)
        tokens, best, gap = greedy(model, ids)
        if gap > GAP:
            return {
                "context": prompt.context,
                "salt": salt,
                "length": len(ids),
                "tokens": tokens,
                "best": best,
                "gap": round(gap, 4),
            }
    raise SystemExit(f"{path.name}: no prompt of {prompt.length} tokens is clear")


def greedy(model: Any, ids: list[int]) -> tuple[list[int], list[float], float]:
    """The next tokens, the best logit at each, and the least gap."""
    tokens: list[int] = []
    best: list[float] = []
    gap = np.inf
    model.reset()
    model.eval(ids)
    for _ in range(tiny_gguf.TOKENS):
        row = model.scores[model.n_tokens - 1]
        second, first = np.sort(row)[-2:]
        gap = min(gap, float((first - second) / (row.max() - row.min())))
        tokens.append(int(row.argmax()))
        best.append(round(float(first), 4))
        if gap < GAP:
            break
        model.eval(tokens[-1:])
    return tokens, best, gap


if __name__ == "__main__":
    main()
