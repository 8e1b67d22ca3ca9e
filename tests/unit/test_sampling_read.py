"""What a model's files recommend for drawing tokens, and what becomes of values that cannot be meant."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gguf import GGUFWriter

from export import recipe
from export.errors import ExportError
from export.recipe import Build
from export.sampling import described, read_sampling
from runtime import bundle
from runtime.bundle import SamplingDefaults
from tests import tiny

ROOT = Path(__file__).parents[2]
FP32 = "[[variants]]\nprecision = 'fp32'"
ALL: dict[str, Any] = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05}


def write(folder: Path, **values: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], **values}))
    return folder


def test_what_the_authors_say_is_taken_and_nothing_else(tmp_path: Path) -> None:
    assert read_sampling(write(tmp_path, do_sample=True, **ALL)) == (SamplingDefaults(**ALL), ())
    assert read_sampling(write(tmp_path, do_sample=True)) == (SamplingDefaults(), ()), "not transformers' top_k of 50"
    assert read_sampling(write(tmp_path, temperature=0.7)) == (SamplingDefaults(temperature=0.7), ()), "as in vLLM"


def test_a_model_that_says_nothing_recommends_nothing(tmp_path: Path) -> None:
    assert read_sampling(tmp_path) == (SamplingDefaults(), ())
    assert read_sampling(write(tmp_path, temperature=None, top_p=None)) == (SamplingDefaults(), ())


def test_no_sampling_is_the_likeliest_token(tmp_path: Path) -> None:
    assert read_sampling(write(tmp_path, do_sample=False, top_p=0.9)) == (SamplingDefaults(temperature=0, top_p=0.9), ())
    assert read_sampling(write(tmp_path, do_sample=True, temperature=0)) == (SamplingDefaults(temperature=0), ())


@pytest.mark.parametrize(
    ("values", "taken"),
    [
        ({"top_k": -1}, SamplingDefaults(top_k=0)),
        ({"top_k": 0}, SamplingDefaults(top_k=0)),
        ({"top_k": 50.0}, SamplingDefaults(top_k=50)),
        ({"temperature": 1}, SamplingDefaults(temperature=1)),
    ],
)
def test_other_ways_to_write_a_value(tmp_path: Path, values: dict[str, Any], taken: SamplingDefaults) -> None:
    assert read_sampling(write(tmp_path, **values)) == (taken, ())


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("temperature", -1, "expected `float` >= 0.0, and it is -1"),
        ("temperature", 100, "expected `float` <= 2.0, and it is 100"),
        ("temperature", "0.7", "expected `float | null`, got `str`, and it is '0.7'"),
        ("temperature", True, "expected `float | null`, got `bool`, and it is True"),
        ("temperature", float("nan"), "expected `float | null`, got `str`, and it is nan"),
        ("temperature", [0.7], "expected `float | null`, got `array`, and it is [0.7]"),
        ("top_p", 0, "expected `float` > 0.0, and it is 0"),
        ("top_p", 1.5, "expected `float` <= 1.0, and it is 1.5"),
        ("top_p", float("inf"), "expected `float | null`, got `str`, and it is inf"),
        ("top_k", -5, "expected `int` >= 0, and it is -5"),
        ("top_k", 2.5, "expected `int | null`, got `float`, and it is 2.5"),
        ("min_p", -0.1, "expected `float` >= 0.0, and it is -0.1"),
        ("repetition_penalty", 0, "expected `float` > 0.0, and it is 0"),
        ("repetition_penalty", -2, "expected `float` > 0.0, and it is -2"),
    ],
)
def test_a_value_that_cannot_be_meant_is_left_out_with_a_note(tmp_path: Path, name: str, value: Any, reason: str) -> None:
    sampling, notes = read_sampling(write(tmp_path, **(ALL | {name: value})))
    assert sampling == msgspec.structs.replace(SamplingDefaults(**ALL), **{name: None})
    assert notes == (f"{name} in generation_config.json is left out: {reason}",)


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "is not valid JSON"), ("[" * 100_000, "is not valid JSON"), ("[]", "is not a JSON object")]
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ExportError, match=sentence):
        read_sampling(tmp_path)


def test_a_gguf_says_it_in_llama_cpps_words(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name in ("temp", "top_p", "min_p", "penalty_repeat"):
        key = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}.get(name, name)
        writer.add_float32(f"general.sampling.{name}", ALL[key])
    writer.add_int32("general.sampling.top_k", 20)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    write(tmp_path, temperature=1.5)  # which is whose, in a folder of several files?
    assert read_sampling(tmp_path, "tiny.gguf") == (SamplingDefaults(**ALL), ())


def test_it_is_shown_in_words() -> None:
    assert described(SamplingDefaults(temperature=0.2, top_k=20)) == "temperature 0.2, top_k 20"
    assert described(SamplingDefaults()) == ""


def test_it_is_in_the_bundle_under_what_the_recipe_says(tmp_path: Path) -> None:
    model = write(tiny.write_model(tmp_path / "mine"), do_sample=True, temperature=0.01, top_k=1, top_p=7)
    file = tmp_path / "mine.toml"
    file.write_text(
        f"name = 'mine'\n[model]\npath = '{model}'\n[sampling]\ntemperature = 0.5\n[[variants]]\nprecision = 'fp32'"
    )
    progress = tiny.Silent()
    with tiny.tracing_once():
        made = tiny.exporting(tmp_path / "engines", verify=False, progress=progress).run(recipe.read(file))
    assert bundle.read(made).sampling == SamplingDefaults(temperature=0.5, top_k=1)
    assert "temperature 0.5, top_k 1" in progress.notes["tokenizer"]
    assert progress.notices == ["top_p in generation_config.json is left out: expected `float` <= 1.0, and it is 7"]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("[sampling]\ntemperature = 3", "Expected `float` <= 2.0 - at `$.sampling.temperature`"),
        ("[sampling]\nheat = 3", "unknown field `heat` - at `$.sampling`"),
        ("tokenizer = 'mine'", "Invalid enum value 'mine' - at `$.tokenizer`"),
    ],
)
def test_a_recipes_own_is_checked(tmp_path: Path, lines: str, sentence: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"name = 'mine'\nmodel = {{ path = 'x' }}\n{lines}")
    with pytest.raises(ExportError) as refused:
        recipe.read(file)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("change", [{"sampling": SamplingDefaults(top_k=1)}, {"chat_template": "x.jinja"}])
def test_embeddings_have_none(change: dict[str, Any]) -> None:
    made = msgspec.structs.replace(tiny.recipe(Path("x"), Build("cpu", "fp32")), task="feature-extraction", **change)
    with pytest.raises(ExportError, match="a chat template and sampling are for answers, and embeddings have none"):
        recipe.checked(made)


def test_the_end_to_end_tests_run_over_the_default_model_with_its_sampling() -> None:
    default, tested = (recipe.read(ROOT / path) for path in ("engines/smollm2-135m-instruct.toml", "tests/data/e2e.toml"))
    assert msgspec.structs.replace(tested, variants=default.variants) == default
    assert set(default.variants) <= set(tested.variants)
