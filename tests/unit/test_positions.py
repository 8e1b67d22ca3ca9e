"""What the survey and the proof see at positions that short prompts do not reach."""

import copy
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from export import decoder, far, pipeline, positions, verify
from export.errors import UnsupportedModel
from export.step import StepModule
from runtime import bundle
from runtime.ort import OrtEngine
from tests import families, tiny


def turning_with_the_longest_row(at: int, model_type: str = "llama") -> PreTrainedModel:
    """A model whose positions turn otherwise in every call in which some row is longer than `at`, as longrope's do."""
    model = families.model(model_type)
    rotary = model.get_submodule("model.rotary_emb")
    plain: Callable[..., Any] = rotary.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> Any:
        turned = plain(x, position_ids, **kwargs)
        past = position_ids.max() >= at
        return tuple(torch.where(past, part.roll(1, -1), part) for part in turned)

    rotary.forward = forward
    return model


def test_lengths_of_a_configuration_are_found_wherever_they_stand() -> None:
    config = families.configuration("phi3, longrope")
    assert positions.configured_lengths(config, 256) == (families.ORIGINAL,)
    gemma = families.configuration("gemma3_text")
    assert families.WINDOW in positions.configured_lengths(gemma, 256)
    assert {40, 41, 45, 256} <= set(positions.row_lengths(config, 256))
    assert positions.row_lengths(config, 30) == (30,)


@pytest.mark.parametrize("whole", [True, False], ids=["computed", "made up"])
def test_a_model_that_lets_a_row_change_another_is_refused_with_the_length_that_would_do(
    monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if not whole:
        monkeypatch.setattr(positions, "MAX_WORK", 0)
    with pytest.raises(UnsupportedModel) as error:
        decoder.survey(turning_with_the_longest_row(100))
    assert "for a row of 256 tokens beside a short one than alone" in str(error.value)
    assert "--max-length 255 or less may leave that out" in str(error.value)
    seen = decoder.survey(turning_with_the_longest_row(100), 100)
    assert seen.max_length == seen.checked_length == 100


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3, longrope", "llama4_text", "mistral"])
def test_a_past_that_is_made_up_says_the_same_as_one_that_was_computed(
    monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    monkeypatch.setattr(positions, "MAX_WORK", 0)
    seen = decoder.survey(families.model(model_type))
    assert seen.checked_length == families.POSITIONS
    assert seen.one_row == (model_type == "llama4_text")


ROW = 2 * 2 * 16 * 4
"""Bytes of a token's keys and values in a layer."""


@pytest.fixture
def room_for_77(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed as a whole, and a past of 77 tokens in one layer is all that can be made up."""
    monkeypatch.setattr(positions, "MAX_WORK", 0)
    monkeypatch.setattr(positions, "MAX_PATIENCE", 0)
    monkeypatch.setattr(positions, "MAX_BYTES", positions._COPIES * ROW * 77)


@pytest.mark.usefixtures("room_for_77")
def test_a_past_that_would_take_too_much_memory_is_made_up_as_far_as_it_goes() -> None:
    seen = decoder.survey(families.model("llama"))
    assert (seen.checked_length, seen.max_length, seen.named_beyond) == (77, families.POSITIONS, None)


@pytest.mark.usefixtures("room_for_77")
def test_a_length_of_the_configuration_that_could_not_be_compared_ends_the_rows_before_it() -> None:
    torch.manual_seed(0)
    config = families.configuration("ministral3")
    config.rope_parameters["original_max_position_embeddings"] = 200
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    families.randomize(model, "ministral3")
    seen = decoder.survey(copy.deepcopy(model))
    assert (seen.checked_length, seen.max_length, seen.named_beyond) == (77, 77, 200)
    asked = decoder.survey(model, 256)  # who says so takes it
    assert (asked.max_length, asked.named_beyond) == (256, 200)
    assert list(pipeline._unseen(asked)) == [
        "rows of more than 77 of 256 tokens were not compared, for want of memory; the model's configuration says that "
        "something changes at 200"
    ]


def test_only_as_many_layers_are_looked_at_as_show_every_kind() -> None:
    model = families.model("gemma3_text")
    seen = decoder.survey(model)
    with positions.first_layers(model, seen) as (short, form):
        assert len(form.layers) == 2  # a window, and none
        assert short is model
    one = families.model("llama")
    with positions.first_layers(one, decoder.survey(one)) as (short, form):
        assert len(form.layers) == len(short.get_submodule("model.layers")) == 1  # type: ignore[arg-type]
    assert len(one.get_submodule("model.layers")) == 2  # type: ignore[arg-type]


def test_llama_4_scales_each_row_by_its_own_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention asks the cache how many tokens there were: of which row?"""
    assert decoder.survey(families.model("llama4_text")).one_row
    real = StepModule.__init__

    def always_by_row(self: StepModule, model: PreTrainedModel, survey: decoder.Survey, *more: Any) -> None:
        survey.one_row = False
        real(self, model, survey, *more)

    monkeypatch.setattr(StepModule, "__init__", always_by_row)
    with pytest.raises(UnsupportedModel, match="gives other logits in steps of several rows"):
        decoder.survey(families.model("llama4_text"))


def test_a_position_table_has_no_rows_for_the_offset_that_it_begins_with() -> None:
    seen = decoder.survey(families.model("roberta"))
    assert seen.max_length == families.POSITIONS - 1
    assert decoder.survey(families.model("opt")).max_length == families.POSITIONS


def test_a_padding_token_that_is_not_counted_as_a_position_is_seen() -> None:
    assert decoder.survey(families.model("roberta")).padding == 0
    for counting in ("llama", "opt", "bloom", "llama4_text"):
        assert decoder.survey(families.model(counting)).padding is None


def test_an_answer_is_judged_up_to_padding_that_is_not_counted() -> None:
    model, prompt = families.model("roberta"), [5, 6, 7]
    right = int(families.logits(model, prompt)[-1].argmax())
    assert verify.compare(model, [prompt], [[right, 0, 9, 9]], padding=0).compared == 2
    assert verify.compare(model, [prompt], [[right, 0, 9, 9]]).compared == 4


def test_what_follows_uncounted_padding_is_never_said(tmp_path: Path, tiny_model: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = families.configuration("roberta")
    config.vocab_size, config.pad_token_id = tiny.VOCAB, 1
    model = AutoModelForCausalLM.from_config(config).eval()
    families.randomize(model, "roberta")
    model.save_pretrained(folder)
    heard = tiny.Silent()
    published = tiny.exporting(tmp_path / "engines", progress=heard).run(tiny.recipe(folder, tiny.BUILDS[0]))
    assert bundle.read(published).stop_ids == (2, 1)
    assert any("takes its padding token (1) for none at all" in sentence for sentence in heard.notices)


def test_a_model_whose_layers_have_different_numbers_of_heads_is_surveyed() -> None:
    model = families.model("dots3_note")
    assert model.config.is_heterogeneous
    assert decoder.survey(model).checked_length == families.POSITIONS


def test_more_than_a_model_was_made_for_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="was made for 256 positions; --max-length 257 is more"):
        decoder.survey(families.model("llama"), 257)
    assert decoder.survey(families.model("bloom"), 500).max_length == 500  # which names no length


# Through an engine --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> tuple[OrtEngine, PreTrainedModel, decoder.Survey]:
    model = families.model("mistral")
    engine, seen = families.engine(model, tmp_path_factory.mktemp("sliding"))
    return engine, model, seen


@pytest.mark.parametrize("length", [9, 100, 256])
def test_an_engine_is_compared_at_the_end_of_a_row_that_was_made_up(
    sliding: tuple[OrtEngine, PreTrainedModel, decoder.Survey], length: int
) -> None:
    engine, model, seen = sliding
    found = far.compare(engine, model, seen, length, verify.TIE)
    assert found is not None
    assert (found.compared, found.different) == (4, 0), found.first


def test_an_engine_that_sees_another_past_is_found_out(
    sliding: tuple[OrtEngine, PreTrainedModel, decoder.Survey], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model, seen = sliding
    real = engine.fill

    def shifted(slot: int, name: str, rows: np.ndarray[Any, Any]) -> None:
        real(slot, name, np.roll(rows, 1, axis=1))

    monkeypatch.setattr(engine, "fill", shifted)
    found = far.compare(engine, model, seen, 200, verify.TIE)
    assert found is not None
    assert found.different


def test_given_a_length_when_exported_then_the_bundle_has_it_and_no_more(tmp_path: Path, tiny_model: Path) -> None:
    with tiny.tracing_once():
        recipe = tiny.recipe(tiny_model, tiny.BUILDS[0])
        folder = tiny.exporting(tmp_path).run(type(recipe)(recipe.name, recipe.model, recipe.variants, max_length=100))
    manifest = bundle.read(folder)
    assert manifest.max_length == 100
    assert manifest.variants[0].verification is not None
    assert manifest.variants[0].verification.longest == 100


@pytest.mark.parametrize(
    ("positions", "sentence"),
    [(-5, "has -5 positions by its config.json (max_position_embeddings)"), (7, "has 7 positions, fewer than an engine is")],
)
def test_a_number_of_positions_with_which_nothing_can_be_compared_is_refused(positions: int, sentence: str) -> None:
    model = families.model("llama")
    model.config.max_position_embeddings = positions
    with pytest.raises(UnsupportedModel) as error:
        decoder.survey(model)
    assert sentence in str(error.value)


@pytest.mark.parametrize(("scale", "said"), [(0.0, "no better than guessing among the model's 512 tokens"), (1e4, "no finite")])
def test_a_model_that_knows_nothing_of_text_is_remarked_on(tmp_path: Path, tiny_model: Path, scale: float, said: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    stored["model.norm.weight"] *= scale
    safetensors.torch.save_file(stored, folder / "model.safetensors", {"format": "pt"})
    heard = tiny.Silent()
    export = tiny.exporting(tmp_path / "engines", text=tiny.TEXT, progress=heard)
    with nullcontext() if scale == 0 else pytest.raises(UnsupportedModel, match=said):
        export.run(tiny.recipe(folder, tiny.BUILDS[0]))
    assert scale or any(said in notice for notice in heard.notices)


def test_given_a_perplexity_beyond_rounding_when_proved_then_nothing_is_published(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify.reference_perplexity
    monkeypatch.setattr(verify, "reference_perplexity", lambda *how: real(*how) * 1.002)
    with tiny.tracing_once(), pytest.raises(UnsupportedModel, match=r"-0\.20%\), which is more than rounding"):
        tiny.exporting(tmp_path, text=tiny.TEXT).run(tiny.recipe(tiny_model, tiny.BUILDS[0]))
    assert not (tmp_path / tiny.NAME).exists()
