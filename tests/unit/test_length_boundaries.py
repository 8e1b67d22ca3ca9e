"""A model that computes long rows in another way than short ones (longrope): each row by its own length in any company.

Phi-3 with 256 original positions of 1,024: prompts on both sides, one whose answer crosses, and in company.
"""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

from export import decoder, verify
from export.step import plain_attention
from runtime.engine import Batch, Draw, Float32, Int64
from runtime.loop import Loop
from runtime.messages import Generate
from runtime.ort import OrtEngine
from runtime.sequence import Sequence
from runtime.slots import Slots
from tests import families

ORIGINAL, POSITIONS = 256, 1024
FRONT = b"front"


def longrope() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=families.VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        original_max_position_embeddings=ORIGINAL,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1 + 0.05 * i for i in range(8)],
            "long_factor": [1.5 + 0.5 * i for i in range(8)],
            "original_max_position_embeddings": ORIGINAL,
        },
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    families.randomize(model, "phi3")
    return model


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return longrope()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrtEngine]:
    made, seen = families.engine(longrope(), tmp_path_factory.mktemp("longrope"), context=POSITIONS)
    assert seen.length_boundaries == made.length_boundaries == (ORIGINAL,)
    yield made
    made.close()


def answers(loop: Loop, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens after each prompt, all of which are asked for at once."""
    told: list[list[int]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        assert loop.submit(FRONT, Generate(str(number), prompt, count)) is None
    while loop.busy:
        for news in loop.step():
            told[int(news.row.id)] += news.row.tokens
            assert news.row.finish in (None, "length")
        loop.slots.check()
    assert loop.slots.free == loop.engine.slots
    return told


def prompt(length: int) -> list[int]:
    (made,) = families.prompts(families.VOCAB, (length,))
    return made


def assert_transformers_own(reference: PreTrainedModel, prompts: list[list[int]], told: list[list[int]]) -> None:
    agreement = verify.compare(reference, prompts, told, families.TIE, (ORIGINAL,))
    assert agreement.different == 0, agreement.first
    assert agreement.ties <= 1


@pytest.mark.parametrize("length", [20, 250, 255, 256, 257, 300, 700])
def test_a_prompt_gets_the_tokens_of_its_own_length(engine: OrtEngine, reference: PreTrainedModel, length: int) -> None:
    told = answers(Loop(engine, queue=9), [prompt(length)], 20)
    assert_transformers_own(reference, [prompt(length)], told)


def test_neither_a_long_nor_a_short_neighbour_changes_a_token(engine: OrtEngine, reference: PreTrainedModel) -> None:
    prompts = [prompt(length) for length in (20, 600, 250, 21, 300, 240)]
    loop = Loop(engine, queue=9)
    told = answers(loop, prompts, 24)
    assert_transformers_own(reference, prompts, told)
    assert told == [answers(loop, [alone], 24)[0] for alone in prompts]


def test_the_factors_of_the_wrong_side_would_give_other_tokens(reference: PreTrainedModel) -> None:
    """Else the tests above would prove nothing."""
    long = prompt(300)
    whole, cut = families.logits(reference, long)[ORIGINAL - 1], families.logits(reference, long[:ORIGINAL])[-1]
    assert float((whole - cut).abs().max()) > 0.01 * float(whole.abs().max())


def test_rows_of_one_kind_are_not_taken_for_the_other(engine: OrtEngine, reference: PreTrainedModel) -> None:
    loop = Loop(engine, queue=9)
    short, long = prompt(200), prompt(200) + prompt(150)
    for asked in (short, long, short, long[:250]):
        assert_transformers_own(reference, [asked], answers(loop, [asked], 8))
    assert loop.counters.cached_tokens == 192 + 192  # both of the short row's; the long one shares with none


def test_a_prompt_that_is_computed_anew_counts_once(engine: OrtEngine) -> None:
    loop = Loop(engine, queue=9)
    answers(loop, [prompt(250)], 20)
    assert loop.counters.prompt_tokens == 250
    assert loop.counters.generated_tokens == 20


def test_guesses_end_where_the_row_would_cross(engine: OrtEngine, reference: PreTrainedModel) -> None:
    repeated = (prompt(10) * 30)[:252]
    assert_transformers_own(reference, [repeated], answers(Loop(engine, queue=9, speculation=True), [repeated], 30))


def test_a_request_that_waits_for_its_slot_again_can_be_cancelled(engine: OrtEngine) -> None:
    loop = Loop(engine, queue=9, prefill_budget=16)  # the first grows past the boundary while the second is prefilled
    crossing = [prompt(250), prompt(251)]
    for number, asked in enumerate(crossing):
        assert loop.submit(FRONT, Generate(str(number), asked, 200)) is None
    while len(list(loop.slots.held)) == loop.running or loop.waiting:  # until one of them waits for its slot
        assert loop.busy
        loop.step()
    assert loop.running == len(crossing)
    for number in range(len(crossing)):
        cancelled = loop.cancel(FRONT, str(number))
        assert cancelled is not None
        assert cancelled.row.finish == "cancelled"
    assert not loop.busy
    assert loop.slots.free == engine.slots
    assert loop.running == 0


class Noting:
    """An engine that is asked to run ahead, and notes for rows of which length it was."""

    def __init__(self, engine: OrtEngine) -> None:
        self._engine, self.ahead = engine, [0]
        self.runs_ahead = True

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def step(self, batch: Batch, ahead: Draw | None = None) -> tuple[Int64, Float32]:
        if ahead is not None:
            self.ahead.append(int(batch.kv_lengths.max()) + 1)
        return self._engine.step(batch)


def test_no_step_is_begun_ahead_across_the_boundary(engine: OrtEngine) -> None:
    noting = Noting(engine)
    answers(Loop(noting, queue=9, speculation=False), [prompt(250)], 20)  # type: ignore[arg-type]
    assert ORIGINAL in noting.ahead
    assert ORIGINAL + 1 not in noting.ahead
    assert ORIGINAL + 3 in noting.ahead


def test_scores_of_a_prompt_are_those_of_its_whole_length(engine: OrtEngine, reference: PreTrainedModel) -> None:
    loop = Loop(engine, queue=9)
    asked = prompt(300)
    assert loop.submit(FRONT, Generate("a", asked, 1, prompt_logprobs=True)) is None
    rows = [news.row for _ in iter(lambda: loop.busy, False) for news in loop.step()]
    scored = torch.tensor([place.logprob for row in rows for place in row.prompt])
    own = families.logits(reference, asked).log_softmax(-1)[:-1].gather(1, torch.tensor(asked[1:])[:, None])[:, 0]
    assert torch.allclose(scored, own, atol=1e-3)


def test_a_prompt_of_another_kind_finds_no_rows() -> None:
    class Nowhere:
        def copy(self, source: int, target: int, length: int) -> None: ...

        def exchange(self, first: tuple[int, int], second: tuple[int, int]) -> None: ...

    slots = Slots(3, [Nowhere()], (64,))
    assert [slots.kind(length) for length in (1, 64, 65, 1000)] == [0, 0, 1, 1]
    for length, cached in ((60, 0), (64, 48), (100, 0), (90, 80)):
        sequence = Sequence(FRONT, Generate(str(length), list(range(3, 3 + length)), 1))
        slots.start(sequence)
        assert sequence.cached == cached
        sequence.computed = length
        slots.prefilled(sequence)
        slots.promote()
        slots.release(sequence)


def test_the_survey_finds_the_boundary_and_leaves_transformers_alone() -> None:
    model = longrope()
    before = families.logits(model, prompt(300))
    seen = decoder.survey(model)
    assert seen.length_boundaries == (ORIGINAL,)
    assert seen.max_length == seen.checked_length == POSITIONS
    with plain_attention(model):
        assert torch.equal(families.logits(model, prompt(300)), before)
        families.logits(model, prompt(20))
        assert torch.equal(families.logits(model, prompt(300)), before)
