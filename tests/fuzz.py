"""Tiny checkpoints with random options: `python -m tests.fuzz COUNT`, or `make fuzz`.

Each case is a causal-LM type, and changes to its configuration drawn from a seed: kinds of rotary positions, windows, layer
types, norms, switches, scales, tied or not, odd sizes. It is saved as a checkpoint, loaded as export loads one, exported, and
run through the decode loop past every length that its configuration names, up to its last position. Its tokens are compared
with those of the model that was saved. What comes of a case is equal, refused by a sentence, or wrong; or transformers itself
does not build or run it. A case that was wrong once stands in tests/data/fuzz_cases.json, which `make test` runs.
"""

import argparse
import copy
import json
import logging
import os
import random
import re
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from export import positions, source, verify
from export.errors import ExportError
from runtime.bundle import Source
from tests import families

Verdict = Literal["equal", "refused", "not built", "wrong", "failed"]
"""`not built`: transformers itself refuses the options; `failed`: neither tokens nor a sentence."""

MAX_SECONDS = 600
MAX_MEMORY = 16 << 30
"""Bytes of address space of one case's process."""
CASES = Path(__file__).parent / "data" / "fuzz_cases.json"
RESULTS = Path(__file__).resolve().parent.parent / ".cache" / "fuzz" / "results.jsonl"
STATEFUL = {
    *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe"),
    *("lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"),
    *("qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "reformer", "xlnet", "xlm"),
}
"""Types that are refused whatever their options, which would say nothing."""
TYPES = tuple(name for name in families.ALL if name not in STATEFUL)
POPULAR = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss", "granite", "olmo2", "smollm3")
"""Every second case is one of these."""

COUNTS = {
    "floor_scale": (3, 21),
    "max_window_layers": (0, 1, 2),
    "no_rope_layer_interval": (1, 2, 3),
    "num_experts_per_tok": (1, 3),
    "first_k_dense_replace": (0, 1, 2),
    "index_topk": (3, 21),
    "n_shared_experts": (1, 2),
    "global_attn_every_n_layers": (1, 2, 3),
}
"""Other numbers, and what becomes of them."""
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu")
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 40)
"""Of windows and chunks."""
ORIGINALS = (13, 21, 40, 64, 200)
"""Positions that a model was trained on first."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention", "sliding_window_size")
_LEFT = {
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "is_encoder_decoder", "is_decoder"),
    *(
        "add_cross_attention",
        "chunk_size_feed_forward",
        "torchscript",
        "use_bfloat16",
        "tie_encoder_decoder",
        "cross_attention",
    ),
    *("gradient_checkpointing", "use_flash_attn", "use_mamba_kernels", "output_router_logits", "multi_query"),
}
"""Switches that change no number of a causal pass, or make another kind of model."""


class Case(msgspec.Struct, frozen=True):
    """A type and the changes to its small configuration."""

    model_type: str
    changes: dict[str, Any]
    seed: int = 0
    """Of the weights."""


class Recorded(Case, frozen=True):
    """A case that was wrong once, and what is right."""

    expected: Literal["equal", "refused"] = "equal"


class Result(msgspec.Struct, frozen=True):
    """What came of a case."""

    case: Case
    verdict: Verdict
    detail: str = ""
    seconds: float = 0.0


def case(seed: int) -> Case:
    """The case of `seed`."""
    draw = random.Random(seed)
    model_type = draw.choice(POPULAR if draw.random() < 0.5 else TYPES)
    base = families.configuration(model_type)
    text = base.get_text_config(decoder=True)
    changes = _changes(draw, text)
    return Case(model_type, changes, seed)


def run(case: Case) -> Result:
    """Build, save, load, export and compare."""
    started = time.monotonic()

    def result(verdict: Verdict, detail: str = "") -> Result:
        return Result(case, verdict, " ".join(detail.split())[:400], round(time.monotonic() - started, 1))

    try:
        model = build(case)
        families.logits(model, [3, 4, 5])
    except Exception as error:
        return result("not built", f"{type(error).__name__}: {error}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            return result(*_judged(model, Path(folder)))
    except ExportError as error:
        return result("refused", str(error))
    except Exception as error:
        return result("failed", f"{type(error).__name__}: {error}")


def build(case: Case) -> PreTrainedModel:
    """The model of `case`, with weights that depend on its seed."""
    torch.manual_seed(case.seed)
    base = families.configuration(case.model_type).to_dict()
    kind = CONFIG_MAPPING[case.model_type]
    nested = "text_config" in base and isinstance(base["text_config"], dict)
    inner = base["text_config"] if nested else base
    inner |= case.changes
    config: PreTrainedConfig = kind.from_dict(base)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    families.randomize(model, case.model_type)
    return model


def _judged(model: PreTrainedModel, folder: Path) -> tuple[Verdict, str]:
    model.save_pretrained(folder / "model")
    loaded = source.load(source.Checkpoint(folder / "model", None, Source("folder", "fuzz")))
    (folder / "engine").mkdir()
    engine, seen = families.engine(loaded, folder / "engine")
    named = positions.configured_lengths(loaded.config.get_text_config(decoder=True), engine.context)
    asked = families.prompts(engine.vocab_size, _sizes(engine.context, named))
    answers = families.greedy(engine, asked, min(families.TOKENS, engine.context // 2))
    reference = copy.deepcopy(model)
    agreement = verify.compare(reference, asked, answers, families.TIE, seen.length_boundaries, padding=seen.padding)
    return ("wrong", agreement.first) if agreement.different else ("equal", f"{agreement.ties} tied" if agreement.ties else "")


def _sizes(context: int, named: tuple[int, ...]) -> list[int]:
    """Lengths of prompts: the families' own, some whose answers pass lengths that the configuration names, and the longest."""
    room = context - min(families.TOKENS, context // 2)
    passing = [length - families.TOKENS // 2 for length in named if length > max(families.PROMPTS)]
    return sorted({min(size, room) for size in (*families.PROMPTS, *passing[-3:], room)})


def _changes(draw: random.Random, config: PreTrainedConfig) -> dict[str, Any]:
    """Changes to some fields of `config`, each by its kind."""
    values = {name: value for name, value in sorted(config.to_dict().items()) if name not in _LEFT}
    changes: dict[str, Any] = {}
    if isinstance(rope := values.get("rope_parameters"), dict) and draw.random() < 0.7:
        changes["rope_parameters"] = _rope(draw, rope, _head_dim(values))
    for name, value in values.items():
        if draw.random() < 0.25 and (drawn := _drawn(draw, name, value)) is not None:
            changes[name] = drawn[0]
    if draw.random() < 0.4:
        changes |= _sizes_of(draw, values)
    return changes


def _drawn(draw: random.Random, name: str, value: Any) -> tuple[Any] | None:
    """A new value for the field `name`; None where it is left alone."""
    if name in _WINDOWS:
        return (draw.choice([*LENGTHS, None]),)
    if name in COUNTS and isinstance(value, int):
        return (draw.choice(COUNTS[name]),)
    if isinstance(value, bool):
        return (not value,)
    if name == "layer_types" and isinstance(value, list):
        return ([draw.choice(sorted(set(value))) for _ in value],)
    if name in ("hidden_act", "hidden_activation", "activation_function") and isinstance(value, str):
        return (draw.choice(ACTIVATIONS),)
    if "softcap" in name:
        return (draw.choice([None, 2.0, 15.0]),)
    if name.endswith("eps") or "epsilon" in name:
        return (draw.choice([1e-6, 1e-5, 1e-3]),)
    if isinstance(value, float) and not any(part in name for part in ("drop", "std", "range", "theta", "coef", "factor")):
        return (round(value * draw.choice([0.5, 0.9, 1.5]) or draw.choice([0.1, 1.0]), 4),)
    return None


def _rope(draw: random.Random, rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Other parameters of rotary positions; of each layer type where they have types."""
    if "rope_type" not in rope and any(isinstance(value, dict) for value in rope.values()):
        return {name: _rope(draw, value, head_dim) if isinstance(value, dict) else value for name, value in rope.items()}
    kept: dict[str, Any] = {name: rope[name] for name in ("partial_rotary_factor", "mrope_section") if name in rope}
    if draw.random() < 0.2:
        kept["partial_rotary_factor"] = draw.choice([0.25, 0.5, 1.0])
    half = int(head_dim * kept.get("partial_rotary_factor", 1.0)) // 2
    kind = draw.choice(["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"])
    made: dict[str, Any] = {**kept, "rope_type": kind, "rope_theta": draw.choice([100.0, 1e4, 1e6])}
    if kind != "default":
        made["factor"] = draw.choice([1.0, 1.5, 4.0, 8.0])
    if kind in ("yarn", "longrope", "llama3"):
        made["original_max_position_embeddings"] = draw.choice(ORIGINALS)
    if kind == "longrope":
        made["short_factor"] = [1 + draw.random() for _ in range(half)]
        made["long_factor"] = [1 + 6 * draw.random() for _ in range(half)]
    if kind == "llama3":
        made |= {"low_freq_factor": 1.0, "high_freq_factor": draw.choice([2.0, 4.0])}
    if kind == "yarn":
        extra = {
            "attention_factor": 1.3,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
            "truncate": False,
        }
        made |= {name: value for name, value in extra.items() if draw.random() < 0.3}
    return made


def _head_dim(values: dict[str, Any]) -> int:
    heads = values.get("num_attention_heads") or 4
    return int(values.get("head_dim") or values.get("hidden_size", 64) // (heads if isinstance(heads, int) else 4))


def _sizes_of(draw: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    """Odd sizes that go together."""
    heads = draw.choice([1, 2, 3, 4, 6])
    dim = draw.choice([8, 10, 16, 24])
    wanted = {
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([size for size in range(1, heads + 1) if heads % size == 0]),
        "head_dim": dim,
        "hidden_size": heads * dim if "head_dim" not in values or draw.random() < 0.5 else draw.choice([24, 40, 66]),
        "intermediate_size": draw.choice([33, 48, 77, 96]),
        "vocab_size": draw.choice([97, 128, 131]),
    }
    return {name: value for name, value in wanted.items() if isinstance(values.get(name), int)}


def recorded() -> list[Recorded]:
    """The cases that were wrong once."""
    return msgspec.json.decode(CASES.read_bytes(), type=list[Recorded])


def main() -> None:
    """Run so many cases, and say what came of them; ends with 1 where any was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    _quiet()
    run(Case("llama", {}))  # so that every fork finds the exporter's tables built
    seeds = range(options.first, options.first + options.count)
    found: Counter[str] = Counter()
    sentences: Counter[str] = Counter()
    with RESULTS.open("ab") as file:
        for seed, result in _run_all(seeds, options.jobs):
            found[result.verdict] += 1
            if result.verdict == "refused":
                sentences[re.sub(r"[-+.e\d]*\d", "N", result.detail)[:90]] += 1
            file.write(msgspec.json.encode(result) + b"\n")
            file.flush()
            shown = json.dumps(result.case.changes) if result.verdict in ("wrong", "failed") else ""
            line = f"{seed:6} {result.case.model_type:20} {result.verdict:10} {result.seconds:5.1f} s  {result.detail} {shown}"
            print(line, flush=True)
    print("\n".join(f"{count:6} refused: {sentence}" for sentence, count in sentences.most_common()))
    print(", ".join(f"{count} {verdict}" for verdict, count in found.most_common()))
    raise SystemExit(1 if found["wrong"] or found["failed"] else 0)


def _run_all(seeds: Iterable[int], jobs: int) -> Iterator[tuple[int, Result]]:
    """Each seed's result, in a process of its own with limits of time and memory, `jobs` of them at a time."""
    waiting, running = list(seeds), dict[Connection, tuple[int, float, ForkProcess]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            seed = waiting.pop(0)
            ours, theirs = get_context("fork").Pipe(duplex=False)
            process = get_context("fork").Process(target=_child, args=(seed, theirs))
            process.start()
            theirs.close()
            running[ours] = seed, time.monotonic(), process
        ready = set(wait(list(running), timeout=1))
        for pipe, (seed, started, process) in list(running.items()):
            if pipe not in ready and time.monotonic() - started < MAX_SECONDS:
                continue
            result = Result(case(seed), "failed", f"no result within {MAX_SECONDS} s", MAX_SECONDS)
            if pipe in ready:
                try:
                    result = msgspec.json.decode(pipe.recv_bytes(), type=Result)
                except EOFError:
                    process.join()
                    result = Result(case(seed), "failed", f"the process ended with code {process.exitcode}")
            process.kill()
            process.join()
            del running[pipe]
            yield seed, result


def _child(seed: int, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    pipe.send_bytes(msgspec.json.encode(run(case(seed))))


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
