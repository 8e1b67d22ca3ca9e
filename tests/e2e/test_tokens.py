"""The ground truth: the default model's engine gives transformers' own greedy tokens."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from export import recipe, source, verify
from runtime import bundle, ort
from runtime.bundle import Bundle
from runtime.draft import Drafter
from runtime.loop import Loop
from runtime.messages import Generate, Row
from runtime.ort import OrtEngine
from runtime.text import Text
from tests.default_model import MODEL, PUBLISHED, real

ROOT = Path(__file__).parents[2]
FOLDER = PUBLISHED / MODEL
TOKENS = 64

pytestmark = [pytest.mark.timeout(1200), real("what is compared here is the real model itself")]

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "List three primary colours.",
    "Translate 'good morning' into Spanish.",
    "What is 17 times 23?",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What causes rain?",
    "Summarize the plot of Cinderella in two sentences.",
    "Name the planets of the solar system in order.",
    "What is the difference between a virus and a bacterium?",
    "Write a short letter to a friend about a holiday.",
    "How do I boil an egg? 🥚",
    "¿Cómo estás?",
)
CONTINUATIONS = (
    "Once upon a time",
    "The quick brown fox",
    "import numpy as np\n\ndef softmax(x):\n",
    "SELECT name, COUNT(*) FROM",
    "In 1969, ",
    "3.14159",
    "Dear Sir or Madam,\n\n",
    "# Introduction\n\nMachine learning is",
    "A: Hello!\nB: Hi, how are you?\nA:",
    '{"name": "Alice", "age":',
    "The following is a list of fruits:\n1.",
    "To be, or not to be,",
    "x",
    "   \n\n  ",
    "Der Hund läuft",
    "The Apache License, Version 2.0, is a permissive free software license written by the Apache Software Foundation. It "
    "allows users to use the software for any purpose, to distribute it, to modify it, and to distribute modified versions "
    "of the software under the terms of the license, without concern for royalties. The name of the foundation and the "
    "license comes from",
)


@pytest.fixture(scope="module")
def manifest() -> Bundle:
    if not FOLDER.exists():
        pytest.fail(f"{FOLDER} is missing: run make e2e, or engineshed export --precision int4 fp32")
    return bundle.read(FOLDER)


@pytest.fixture(scope="module")
def prompts(manifest: Bundle) -> list[list[int]]:
    text = Text.load(FOLDER, manifest)
    chats = [text.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return chats + [text.encode(start) for start in CONTINUATIONS]


@pytest.fixture(scope="module")
def reference(manifest: Bundle) -> PreTrainedModel:
    """The default model in transformers, loaded from the same file."""
    wanted = recipe.read(ROOT / "engines" / "smollm2-135m-instruct.toml").model
    return source.load(source.fetch(wanted, ROOT / ".cache" / "models"))


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str, int], OrtEngine]]:
    engines: list[OrtEngine] = []

    def load(variant: str, slots: int) -> OrtEngine:
        engines.append(ort.load(FOLDER, variant, slots=slots, context=512))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


def answers(engine: OrtEngine, prompts: list[list[int]], *, at_once: int, speculation: bool = True) -> list[list[int]]:
    """Greedy answers of TOKENS tokens, `at_once` requests in the loop at a time; stop tokens do not stop."""
    loop = Loop(engine, queue=len(prompts), speculation=speculation)
    got: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), at_once):
        for i, prompt in enumerate(prompts[start : start + at_once], start):
            assert loop.submit(b"test", Generate(str(i), prompt, max_tokens=TOKENS)) is None
        while loop.busy:
            for news in loop.step():
                got[int(news.row.id)] += news.row.tokens
    return got


def test_the_fp32_engine_gives_transformers_greedy_tokens_alone_and_16_at_a_time(
    load: Callable[[str, int], OrtEngine], prompts: list[list[int]], reference: PreTrainedModel
) -> None:
    engine = load("cpu-fp32", 16)
    together = answers(engine, prompts, at_once=16)
    agreement = verify.compare(reference, prompts, together)
    assert (agreement.compared, agreement.equal) == (32 * TOKENS, 32 * TOKENS), agreement.first
    assert answers(engine, prompts, at_once=1) == together
    assert answers(engine, prompts, at_once=16, speculation=False) == together


def test_the_half_precision_graph_of_the_plan_gives_transformers_tokens_up_to_ties(
    manifest: Bundle, prompts: list[list[int]], reference: PreTrainedModel
) -> None:
    """What TensorRT builds from, in ONNX Runtime on the CPU: it proves the numbers of this dialect without a GPU."""
    variant = manifest.variant("tensorrt-rtx-fp16")
    assert variant.plan is not None
    graph, asked = msgspec.structs.replace(variant, model=variant.plan.source), prompts[::3]
    engine = OrtEngine(FOLDER, graph, manifest.vocab_size, slots=len(asked), context=variant.plan.capacity)
    agreement = verify.compare(reference, asked, verify.continue_prompts(engine, asked, count=32), verify.TIES["fp16"])
    engine.close()

    assert agreement.different == 0, agreement.first
    assert agreement.compared == 32 * len(asked)
    assert agreement.equal > 0.98 * agreement.compared


STORY = (
    "The lighthouse at Cape Morrow was built in 1874 by the engineer Thomas Hale. It stands 38 metres tall and its lamp can be "
    "seen from 24 nautical miles away. The keeper, Anna Lind, has lived there since 1998 with her two dogs. Every spring she "
    "paints the white tower and repairs the copper roof."
)


@pytest.mark.parametrize("variant", ["cpu-fp32", "cpu-int4"])
def test_copying_takes_a_fraction_of_the_steps(
    load: Callable[[str, int], OrtEngine], manifest: Bundle, reference: PreTrainedModel, variant: str
) -> None:
    engine, text = load(variant, 1), Text.load(FOLDER, manifest)
    prompt = text.chat([{"role": "user", "content": f"Repeat the following text word for word.\n\n{STORY}"}])
    answered, decode_steps = {}, 0
    for speculation in (False, True):
        loop = Loop(engine, queue=1, speculation=speculation)
        loop.submit(b"test", Generate("a", prompt, max_tokens=75))
        rows: list[Row] = []
        while loop.busy:
            rows += [news.row for news in loop.step()]
        answered[speculation] = [token for row in rows for token in row.tokens]
        decode_steps = len(rows) - 1
    stream = text.stream([])
    assert STORY.startswith((stream.push(answered[True]) + stream.finish()).strip())
    assert decode_steps < 75 / 2.5
    if variant == "cpu-fp32":
        assert answered[True] == answered[False]
        assert verify.compare(reference, [prompt], [answered[True]]).different == 0


def test_a_draft_engine_in_four_bits_speeds_up_the_one_in_fp32_and_changes_no_token(
    load: Callable[[str, int], OrtEngine], prompts: list[list[int]]
) -> None:
    """One request at a time: in company, guesses verified alone have to beat a shared step."""
    engine = load("cpu-fp32", 16)
    plain = answers(engine, prompts[:4], at_once=1, speculation=False)
    loop = Loop(engine, queue=4, drafter=Drafter(load("cpu-int4", 16), engine))
    got: list[list[int]] = []
    for prompt in prompts[:4]:
        loop.submit(b"test", Generate("a", prompt, max_tokens=TOKENS))
        got.append([])
        while loop.busy:
            for news in loop.step():
                got[-1] += news.row.tokens
    assert got == plain
    assert loop.counters.accepted_tokens > 0.6 * loop.counters.guessed_tokens > 50


@torch.no_grad()
def test_transformers_own_generate_says_the_same(
    load: Callable[[str, int], OrtEngine], prompts: list[list[int]], reference: PreTrainedModel
) -> None:
    """The other tests judge each token by a forward pass; this one lets transformers generate, with its own cache."""
    engine = load("cpu-fp32", 1)
    for prompt, answer in zip(prompts[::8], answers(engine, prompts[::8], at_once=1), strict=True):
        generated = cast(Any, reference).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),  # else it hides pad tokens, which chats contain
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=None,
        )
        assert answer == generated[0, len(prompt) :].tolist()


def test_the_int4_engine_keeps_the_models_perplexity_and_most_of_its_tokens(
    load: Callable[[str, int], OrtEngine], manifest: Bundle, prompts: list[list[int]], reference: PreTrainedModel
) -> None:
    """The GGUF's own 4- and 8-bit blocks are carried over; what differs is the rounding of activations to int8."""
    recorded = manifest.by_name["cpu-int4"].perplexity
    assert recorded is not None
    assert recorded.tokens >= 2048
    assert abs(recorded.value / recorded.reference - 1) < 0.01
    engine = load("cpu-int4", 16)
    text = Text.load(FOLDER, manifest)
    tokens = text.encode((ROOT / "tests" / "data" / "perplexity.txt").read_text())[:512]
    fresh = verify.engine_perplexity(engine, tokens) / verify.reference_perplexity(reference, tokens)
    assert abs(fresh - 1) < 0.02  # over a quarter of the text: says that the manifest's figure is no stale one
    agreement = verify.compare(reference, prompts[:16], answers(engine, prompts[:16], at_once=16))
    assert agreement.equal > 0.9 * agreement.compared


def test_an_int4_request_answers_alike_in_every_batch_of_two_and_more(
    load: Callable[[str, int], OrtEngine], prompts: list[list[int]]
) -> None:
    """ONNX Runtime has a 4-bit kernel of its own for a single row, which rounds otherwise; all other sizes share one."""
    engine = load("cpu-int4", 16)
    # The same first two tenants: they decode in batches of 16 or of 2, but never alone.
    assert answers(engine, prompts[:16], at_once=16)[:2] == answers(engine, prompts[:2], at_once=2)


def test_every_variant_was_verified_before_it_was_published(manifest: Bundle) -> None:
    for name in ("cpu-fp32", "cpu-int4"):
        verification = manifest.by_name[name].verification
        assert verification is not None
        assert verification.tokens >= 100
        assert verification.equal > 0.9 * verification.tokens
    exact = manifest.by_name["cpu-fp32"].verification
    assert exact is not None
    assert exact.equal == exact.tokens


def test_weights_are_stored_once(manifest: Bundle) -> None:
    """One token reads 28 MB of int8 and 3.5 MB of scales, which are the embedding and the LM head both, and 106M weights at 4
    bits with their scales; for many tokens there are 8 bits a weight beside that.
    """
    assert manifest.by_name["cpu-int4"].step_bytes < 110e6
    assert manifest.by_name["cpu-int4"].size < 245e6
    assert manifest.by_name["cpu-fp32"].size < 545e6
