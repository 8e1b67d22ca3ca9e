"""runtime.ort_cuda's engine on the GPU, in every precision, against transformers on the GPU in the same dtype."""

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import pytest
import torch

from export.verify import continue_prompts
from runtime.cuda import Cuda
from runtime.engine import Batch, Draw, Int64
from runtime.gpu import GpuEngine
from runtime.ort_providers import cuda_options

if TYPE_CHECKING:
    from tests.gpu.conftest import Loaded

COUNT = 24
LOGPROBS = {"fp16": 0.02, "bf16": 0.15, "int4": 0.03}
"""By how much a log-probability may differ between two orders of summing, where logits are some 10 apart."""
SHAPES = {
    "Shape",
    "Gather",
    "Concat",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Cast",
    "Add",
    "Sub",
    "Mul",
    "Reshape",
    "Range",
    "Where",
}
"""Operators that ONNX Runtime may leave to the CPU: those that compute dimensions, which the host needs to know."""


def chunk_of(slot: int, part: list[int], end: int, rows: list[int]) -> Batch:
    """Tokens for one slot, which holds `end` once they are written."""
    ids, logit_rows = np.array([part], np.int64), np.array(rows, np.int64)
    return Batch(slot, ids, np.array([end], np.int32), logit_rows, Draw.greedy(len(rows)))


def prefill(engine: GpuEngine, slot: int, prompt: list[int]) -> int:
    """The first token after a prompt that is computed as a whole."""
    tokens, _ = engine.step(chunk_of(slot, prompt, len(prompt), [len(prompt) - 1]))
    return int(tokens[0])


def step_of(first_slot: int, tokens: list[int], lengths: list[int]) -> Batch:
    """A decode step of neighbouring slots, which hold `lengths` once it is done."""
    rows = np.arange(len(tokens), dtype=np.int64)
    ids: Int64 = np.array(tokens, np.int64)[:, None]
    return Batch(first_slot, ids, np.array(lengths, np.int32), rows, Draw.greedy(len(tokens)))


def decode(engine: GpuEngine, prompts: list[list[int]], answers: list[list[int]], count: int, first_slot: int = 0) -> None:
    """Append `count` tokens to the answers of prompts that stand in the slots from `first_slot` on."""
    for _ in range(count):
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        tokens, _ = engine.step(step_of(first_slot, [answer[-1] for answer in answers], lengths))
        for answer, token in zip(answers, tokens.tolist(), strict=True):
            answer.append(token)


def test_prompts_that_are_alone(loaded: "Loaded") -> None:
    for prompt in loaded.prompts:
        loaded.check([prompt], continue_prompts(loaded.engine, [prompt], COUNT, loaded.engine.chunk))


def test_a_ragged_batch_in_all_slots(loaded: "Loaded") -> None:
    assert len(loaded.prompts) == loaded.engine.slots
    answers = continue_prompts(loaded.engine, loaded.prompts, COUNT, loaded.engine.chunk)
    assert len({token for answer in answers for token in answer}) > COUNT, "a model that repeats itself proves little"
    loaded.check(loaded.prompts, answers)


def test_prompts_in_chunks(loaded: "Loaded") -> None:
    loaded.check(loaded.prompts, continue_prompts(loaded.engine, loaded.prompts, COUNT, chunk=7))


def test_a_slot_to_its_last_token(loaded: "Loaded") -> None:
    prompt, count = loaded.prompts[3], loaded.engine.context - len(loaded.prompts[3])
    loaded.check([prompt], continue_prompts(loaded.engine, [prompt], count, loaded.engine.chunk))


def test_steps_ahead_that_are_taken(loaded: "Loaded") -> None:
    engine, prompts = loaded.engine, loaded.prompts
    answers = [[prefill(engine, slot, prompt)] for slot, prompt in enumerate(prompts)]
    for _ in range(COUNT):
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        tokens, _ = engine.step(step_of(0, [answer[-1] for answer in answers], lengths), Draw.greedy(len(prompts)))
        for answer, token in zip(answers, tokens.tolist(), strict=True):
            answer.append(token)
    loaded.check(prompts, answers)


def test_steps_ahead_that_are_dropped(loaded: "Loaded") -> None:
    """Every step begins one ahead, and every other time another one is asked for: of fewer rows, with another last token."""
    engine, prompts = loaded.engine, loaded.prompts[:4]
    answers = [[prefill(engine, slot, prompt)] for slot, prompt in enumerate(prompts)]
    for number in range(COUNT):
        rows = 4 if number % 2 else 3
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)][:rows]
        last = [answer[-1] for answer in answers][:rows]
        if number % 6 == 4:  # as a request that is told how its answer goes on: what follows is judged after that
            last[0] = answers[0][-1] = (last[0] + 1) % engine.vocab_size
        tokens, _ = engine.step(step_of(0, last, lengths), Draw.greedy(rows))
        for answer, token in zip(answers, tokens.tolist(), strict=False):
            answer.append(token)
    for prompt, answer in zip(prompts[1:], answers[1:], strict=True):
        loaded.check([prompt], [answer])
    told = [index for index, token in enumerate(answers[0]) if index and index % 6 == 4]
    assert told, "some tokens were told"
    prompt, begin = prompts[0], 0
    for index in [*told, len(answers[0])]:
        own = answers[0][begin:index]
        loaded.check([prompt + answers[0][:begin]], [own])
        begin = index + 1


def test_a_prompt_beside_a_step_ahead(loaded: "Loaded") -> None:
    engine, (one, other) = loaded.engine, (loaded.prompts[1], loaded.prompts[3])
    answer = [prefill(engine, 0, one)]
    for index in range(COUNT):
        tokens, _ = engine.step(step_of(0, [answer[-1]], [len(one) + len(answer)]), Draw.greedy(1))
        answer.append(int(tokens[0]))
        if index == COUNT // 2:
            late = [[prefill(engine, 1, other)]]
    decode(engine, [other], late, COUNT, first_slot=1)
    loaded.check([one, other], [answer, *late])


def test_copied_and_exchanged_slots(loaded: "Loaded") -> None:
    engine, (short, long) = loaded.engine, (loaded.prompts[1], loaded.prompts[3])
    answers = [[prefill(engine, 0, short)], [prefill(engine, 1, long)]]
    decode(engine, [short, long], answers, 4)
    engine.exchange((0, len(short) + 4), (1, len(long) + 4))
    decode(engine, [long, short], [answers[1], answers[0]], 4)
    engine.copy(0, 4, len(long) + 8)
    engine.copy(1, 5, len(short) + 8)
    copies = [list(answers[1]), list(answers[0])]
    decode(engine, [long, short], copies, 8, first_slot=4)
    decode(engine, [long, short], [answers[1], answers[0]], 8)
    loaded.check([short, long, long, short], [*answers, *copies])


def test_recorded_steps_say_the_same_as_others(loaded: "Loaded") -> None:
    """Steps from the first slot on are recorded and replayed, others are not."""
    engine, prompts = loaded.engine, loaded.prompts[:5]
    answers = []
    for first_slot in (0, 1):
        own = [[prefill(engine, first_slot + index, prompt)] for index, prompt in enumerate(prompts)]
        decode(engine, prompts, own, COUNT, first_slot)
        loaded.check(prompts, own)
        answers.append(own)
    last, lengths = [answer[-1] for answer in answers[0]], [len(prompt) + 1 + COUNT for prompt in prompts]
    forced = Draw.force(np.arange(5, dtype=np.int64))
    scores = []
    for first_slot in (0, 1):
        for index, (prompt, answer) in enumerate(zip(prompts, answers[0], strict=True)):
            whole = prompt + answer[:-1]
            engine.step(chunk_of(first_slot + index, whole, len(whole), []))
        batch = step_of(first_slot, last, lengths)
        scores.append(engine.step(Batch(first_slot, batch.input_ids, batch.kv_lengths, batch.logit_rows, forced))[1])
    np.testing.assert_allclose(scores[0], scores[1], atol=LOGPROBS[loaded.exported.precision])


def test_decode_steps_are_recorded(loaded: "Loaded") -> None:
    if loaded.exported.family == "explicit" and loaded.warnings:
        pytest.xfail("; ".join(loaded.warnings))
    assert not loaded.warnings


@torch.no_grad()
def test_log_probabilities_of_forced_tokens(loaded: "Loaded") -> None:
    prompt, model = loaded.prompts[3], loaded.exported.on_gpu
    targets = np.array(prompt[1:], np.int64)
    batch = chunk_of(2, prompt, len(prompt), list(range(len(targets))))
    tokens, got = loaded.engine.step(
        Batch(2, batch.input_ids, batch.kv_lengths, batch.logit_rows, Draw.force(targets)),
    )
    logits = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits[0, :-1].float()
    expected = torch.log_softmax(logits, -1).cpu().numpy()[np.arange(len(targets)), targets]
    assert tokens.tolist() == targets.tolist()
    np.testing.assert_allclose(got, expected, atol=LOGPROBS[loaded.exported.precision])


def test_every_node_runs_on_the_gpu(loaded: "Loaded", capsys: pytest.CaptureFixture[str]) -> None:
    cuda = Cuda()
    try:
        for name in (loaded.exported.graphs.model, loaded.exported.graphs.sampler, loaded.exported.graphs.adorned):
            options = ort.SessionOptions()
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            providers = [("CUDAExecutionProvider", cuda_options(cuda, 1 << 28)), "CPUExecutionProvider"]
            session = ort.InferenceSession(loaded.exported.folder / name, options, providers=providers, enable_fallback=0)
            parts = session.get_provider_graph_assignment_info()
            nodes = [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
            elsewhere = sorted({operator for provider, operator in nodes if provider != "CUDAExecutionProvider"})
            with capsys.disabled():
                print(
                    f"\n{loaded.exported.graphs.name} {name}: {len(nodes)} nodes, on the CPU: {', '.join(elsewhere) or 'none'}"
                )
            assert any(provider == "CUDAExecutionProvider" for provider, _ in nodes)
            if loaded.exported.family != "explicit":
                assert set(elsewhere) <= SHAPES
    finally:
        cuda.close()
