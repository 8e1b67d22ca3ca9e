"""What constraints cost: decode steps of answers that keep to a JSON schema beside the same steps without, in turns.

`python -m bench.structured --bundle engines/smollm2-135m-instruct`; on a machine that others use with `--threads 1`, where the
CPU's time tells what the clock does not.
"""

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median

from runtime import bundle, ort
from runtime.grammar import Grammars
from runtime.loop import Loop
from runtime.messages import Constraint, Generate, Sampling

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
        "role": {"enum": ["engineer", "manager", "designer", "other"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "role", "tags", "address"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 1000}
"""It goes on for longer than any measurement."""


def seconds_a_token(
    loop: Loop, streams: int, tokens: int, constraint: Constraint | None, temperature: float
) -> tuple[float, float]:
    """Seconds from one token of a stream to the next where `streams` answers decode together, over `tokens` tokens of each: by
    the clock, and of this process on the CPU.
    """
    chance = random.Random(streams)
    for stream in range(streams):
        prompt = [chance.randrange(100, 40_000) for _ in range(32)]
        sampling = Sampling(temperature=temperature, seed=stream)
        loop.submit(b"", Generate(f"{stream}", prompt, tokens + 64, sampling, constraint=constraint))
    while len(loop.slots.decoding) < streams:
        loop.step()
    for _ in range(8):
        loop.step()
    before, start, cpu = loop.counters.generated_tokens, time.perf_counter(), time.process_time()
    while loop.counters.generated_tokens - before < tokens * streams:
        loop.step()
    taken, cpu = time.perf_counter() - start, time.process_time() - cpu
    made = loop.counters.generated_tokens - before
    for stream in range(streams):
        loop.cancel(b"", f"{stream}")
    return taken / made * streams, cpu / made * streams


def main() -> None:
    """Print a line for each variant and setting."""
    parser = argparse.ArgumentParser(prog="bench.structured", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=["cpu-int4", "cpu-fp32"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    manifest = bundle.read(arguments.bundle)
    constraint = Constraint("json_schema", json.dumps(SCHEMA))
    for variant in arguments.variants:
        slots = max(arguments.streams)
        engine = ort.load(arguments.bundle, variant, slots=slots, context=512, threads=arguments.threads)
        grammars = Grammars(arguments.bundle / bundle.TOKENIZER, engine.vocab_size, manifest.stop_ids)
        plain, forcing = (Loop(engine, queue=slots, speculation=guesses, grammars=grammars) for guesses in (False, True))
        for streams in arguments.streams:
            settings = [(plain, None), (plain, constraint), (forcing, constraint)]
            times: list[list[tuple[float, float]]] = [[], [], []]
            for _ in range(arguments.repeats):
                for (loop, wanted), taken in zip(settings, times, strict=True):
                    taken.append(seconds_a_token(loop, streams, arguments.tokens, wanted, arguments.temperature))
            for kind, name in enumerate(("clock", "CPU")):
                free, bound, forced = ([turn[kind] for turn in turns] for turns in times)
                ratio = median(b / a for a, b in zip(free, bound, strict=True))
                print(
                    f"{variant} streams={streams}, {name}: {median(free) * 1e3:.2f} ms a token without, "
                    f"{median(bound) * 1e3:.2f} ms with a schema ({ratio - 1:+.1%} in paired turns), "
                    f"{median(forced) * 1e3:.2f} ms where forced tokens share steps",
                    flush=True,
                )
        grammars.close()
        engine.close()


if __name__ == "__main__":
    main()
