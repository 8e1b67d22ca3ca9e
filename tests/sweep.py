"""Try every causal-LM type that transformers knows: `python -m tests.sweep [types...]`, or `make sweep`.

Each type runs in a process of its own, forked with torch and ONNX loaded. Results are appended to .cache/sweep/results.jsonl,
so that a sweep that was interrupted goes on where it stopped; types named on the command line run again. At the end
docs/architectures.md is written from the last result of each type.
"""

import argparse
import logging
import multiprocessing
import platform
import resource
import tempfile
import time
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, get_args

import msgspec
import torch

from export.errors import UnsupportedModel
from tests import families

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".cache" / "sweep" / "results.jsonl"
REPORT = ROOT / "docs" / "architectures.md"
PACKAGES = ("torch", "transformers", "onnxruntime", "onnx", "onnxscript")

NAMES = (*families.ALL, *families.OPTIONS)
SECONDS = 180
MEMORY = 16 << 30
"""Bytes of address space of one type's process."""


Verdict = Literal["equal", "refused", "wrong", "failed"]
"""`failed`: neither tokens nor a sentence, which is a fault of export or of the test's configuration."""

INTRODUCTION = f"""# Architectures

export has no code per model. What it can carry is found by trying every causal-LM type that the installed transformers
knows, with a tiny random model each: traced, written, loaded by the ONNX Runtime engine, and run greedily through the
decode loop for {families.TOKENS} tokens after each of {len(families.PROMPTS) + 1} prompts
({", ".join(map(str, families.PROMPTS))} tokens, and one whose answer ends with the last position, the {families.POSITIONS}th):
prefill in chunks of {families.CHUNK}, decode of all rows at once, four slots. Sliding windows, attention chunks, sparse
selections and the floors of attention temperatures are {families.WINDOW} wide, and the length that a model was trained on first
is {families.ORIGINAL}, so that every one of them is passed. Each token is compared with the best one of transformers' own
plain forward pass over the same tokens (float32, eager attention). Beside the types as they are, some stand here with a kind
of rotary positions that depends on the length.

A type's result is not a promise for each of its checkpoints: one with other options may be refused. export compares
every engine that it makes with transformers before it publishes a bundle. Text only: a multimodal type stands for what
`AutoModelForCausalLM` makes of it, fed with tokens.
"""

EQUAL = f"""*fused*: GroupQueryAttention appends to the slot and attends. *explicit*: TensorScatter into the slot, then the
model's own attention under a mask; right, but slower on long contexts. *ties*: tokens that differ where the reference's
two best logits lie within {families.TIE:.0e} of the row's spread, where rounding decides.
"""


class Result(msgspec.Struct, frozen=True):
    """What became of one type."""

    model_type: str
    verdict: Verdict
    detail: str
    """The sentence of a refusal, or what went wrong."""
    attention: str = ""
    """Layers served by each attention, e.g. `fused` or `1 fused, 1 explicit`."""
    ties: int = 0
    seconds: float = 0.0


def judge(model_type: str) -> Result:
    """Make a tiny model of `model_type`, export it, and compare its tokens with those of transformers."""
    started = time.monotonic()

    def result(verdict: Verdict, detail: str = "", **more: str | int) -> Result:
        return Result(model_type, verdict, detail, seconds=round(time.monotonic() - started, 1), **more)  # type: ignore[arg-type]

    try:
        model = families.model(model_type)
    except Exception as error:
        said = _line(str(error)).split(" You can ")[0]
        return result("refused", f"transformers itself does not build it: {said} ({type(error).__name__})")
    try:
        with tempfile.TemporaryDirectory() as folder:
            seen = families.compare(model, Path(folder))
    except UnsupportedModel as error:
        return result("refused", str(error))
    except MemoryError:
        return result("failed", f"more than {MEMORY >> 30} GiB of memory")
    except Exception as error:
        return result("failed", f"{type(error).__name__}: {_line(str(error))}")
    if seen.different:  # export compares too, and refuses
        return result("wrong", seen.different[0], attention=_attention(seen), ties=seen.ties)
    return result("equal", attention=_attention(seen), ties=seen.ties)


def run(model_type: str) -> Result:
    """`judge` in a process with limits on its time and memory."""
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(model_type, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return Result(model_type, "failed", f"no result within {SECONDS} s", seconds=SECONDS)
        return msgspec.json.decode(ours.recv_bytes(), type=Result)
    except EOFError:
        process.join()
        return Result(model_type, "failed", f"the process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def read() -> dict[str, Result]:
    """The last result of each type."""
    if not RESULTS.exists():
        return {}
    results = [msgspec.json.decode(line, type=Result) for line in RESULTS.read_bytes().splitlines()]
    return {result.model_type: result for result in results}


def report(results: Iterable[Result]) -> str:
    """docs/architectures.md."""
    by_verdict: dict[str, list[Result]] = {verdict: [] for verdict in get_args(Verdict)}
    for result in results:
        by_verdict[result.verdict].append(result)
    equal, refused = by_verdict["equal"], by_verdict["refused"]
    total = sum(map(len, by_verdict.values()))
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    counts = ", ".join(f"**{len(found)} {verdict}**" for verdict, found in by_verdict.items())
    rows = [f"| {x.model_type} | {x.attention} | {x.ties or ''} |" for x in equal]
    parts = [
        INTRODUCTION,
        f"Of {total} types, {counts}. Made with `make sweep` under {versions} and Python {platform.python_version()}.\n",
        "## Equal\n",
        EQUAL,
        "| type | attention | ties |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n",
        "## Refused\n",
        "Export stops with this sentence and writes no bundle.\n",
        _table(refused),
    ]
    for verdict in ("wrong", "failed"):
        parts += [f"## {verdict.capitalize()}\n", _table(by_verdict[verdict]) if by_verdict[verdict] else "None.\n"]
    return "\n".join(parts)


def _table(results: Iterable[Result]) -> str:
    lines = ["| type | why |", "| --- | --- |"]
    lines += [f"| {result.model_type} | {result.detail.replace('|', '/')} |" for result in results]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the types named on the command line, or all that have no result yet, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types to run again; by default all that have no result yet")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    if options.again:
        RESULTS.unlink(missing_ok=True)
    known = read()
    _load()
    for model_type in options.types or [name for name in NAMES if name not in known]:
        result = run(model_type)
        with RESULTS.open("ab") as file:
            file.write(msgspec.json.encode(result) + b"\n")
        print(
            f"{result.model_type:24} {result.verdict:8} {result.attention:20} {result.seconds:6.1f} s  {result.detail}",
            flush=True,
        )
    results = read()
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(report(results[name] for name in sorted(results) if name in NAMES))


def _child(model_type: str, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe.send_bytes(msgspec.json.encode(judge(model_type)))


def _load() -> None:
    """Export one model before forking, so that every child finds the exporter's tables built."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        families.compare(families.model("llama"), Path(folder))


def _attention(seen: families.Comparison) -> str:
    explicit = seen.layers - seen.fused
    if not explicit:
        return "fused"
    return f"{seen.fused} fused, {explicit} explicit" if seen.fused else "explicit"


def _line(text: str) -> str:
    return " ".join(text.split())[:600]


if __name__ == "__main__":
    main()
