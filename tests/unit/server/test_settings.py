"""`engineshed serve --config`: a file instead of options, checked as they are."""

import argparse
from pathlib import Path

import pytest

from runtime.bundle import SamplingDefaults
from server import serve

EXAMPLE = Path(__file__).parents[3] / "docs" / "serve.toml"


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    return parser.parse_args(arguments)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        parsed(*arguments)
    return capsys.readouterr().err


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "serve.toml"


def test_the_documented_file_says_what_holds_without_it() -> None:
    told, plain = vars(parsed(f"--config={EXAMPLE}")), vars(parsed("--model=smollm2-135m-instruct"))
    assert told | {"config": None} == plain


def test_every_key_of_the_documented_file_is_taken_also_those_that_are_commented_out(tmp_path: Path) -> None:
    keys = {option.removeprefix("--").replace("-", "_") for option in _options()} - {"help", "config"}
    lines = [line.removeprefix("# ") for line in EXAMPLE.read_text().splitlines() if " = " in line or "[models." in line]
    table = next(number for number, line in enumerate(lines) if line.startswith("[models."))
    named = {line.partition(" =")[0] for line in lines[:table]}
    assert named - keys == set()
    assert keys - named == {"draft_variant"}, "every option is in the file"
    whole = tmp_path / "all.toml"
    whole.write_text("\n".join(lines))
    told = parsed(f"--config={whole}")
    assert told.build_on_load is True
    (model,) = told.models.values()
    assert (model.replicas, model.slots, model.pinned) == (1, 16, True)
    assert (model.generation_config, model.sampling) == ("none", SamplingDefaults(temperature=0.3, top_p=0.9))
    assert (told.generation_config, told.override_generation_config) == ("none", SamplingDefaults(temperature=0.3))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[models.a]\nslotz = 3", "unknown field `slotz` - at `$[...]`"),
        ("[models.a]\nslots = 0", "`$[...].slots`"),
        ("[models.a]\nsampling = { temperature = 3 }", "Expected `float` <= 2.0 - at `$[...].sampling.temperature`"),
        ("[models.a]\nsampling = { heat = 1 }", "unknown field `heat` - at `$[...].sampling`"),
        ("[models.a]\ngeneration_config = 'vllm'", "Invalid enum value 'vllm' - at `$[...].generation_config`"),
        ("models = 3", "models: Expected `object`"),
        ("[models.a]\nsampling = { temperature = inf }", "Expected `float` <= 2.0 - at `$[...].sampling.temperature`"),
        ("override_generation_config = { temperature = inf }", "config: Expected `float` <= 2.0 - at `$.temperature`"),
        ("override_generation_config = { top_p = nan }", "config: Expected `float` > 0.0 - at `$.top_p`"),
        ("override_generation_config = { heat = 1 }", "config: Object contains unknown field `heat`"),
    ],
)
def test_a_table_is_checked_key_by_key(config: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str) -> None:
    config.write_text(text)
    assert sentence in refused(capsys, f"--config={config}")


def _options() -> list[str]:
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    return [option for option in parser.format_help().replace(",", " ").replace(")", " ").split() if option.startswith("--")]


def test_kinds_of_values(config: Path) -> None:
    config.write_text(
        'port = 9\nslots = 3\ngpu_memory = 0.5\nno_speculation = true\nbuild_on_load = false\ndevice = ["cpu", "cpu"]\n'
    )
    args = parsed(f"--config={config}")
    assert (args.port, args.slots, args.gpu_memory, args.no_speculation, args.build_on_load) == (9, 3, 0.5, True, False)
    assert [str(device) for device in args.device] == ["cpu", "cpu"]


def test_what_stands_after_it_has_the_last_word(config: Path) -> None:
    config.write_text("port = 9\nslots = 3\n")
    args = parsed("--port=7", f"--config={config}", "--slots=5")
    assert (args.port, args.slots) == (9, 5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("colour = 'red'", "has a key 'colour' that is no option"),
        ("slot = 3", "has a key 'slot' that is no option"),
        ("slots = 0", "argument --slots: 0 is less than 1"),
        ("slots = 'many'", "argument --slots: 'many' is no whole number"),
        ("device = ['gpu']", "argument --device: 'gpu' is no device"),
        ("generation_config = 'all'", "argument --generation-config: invalid choice: 'all' (choose from 'auto', 'none')"),
        ("override_generation_config = { top_p = 0 }", "override_generation_config: Expected `float` > 0.0 - at `$.top_p`"),
        ("override_generation_config = 'hot'", "'hot' is not valid JSON: "),
        ("config = 'other.toml'", "has a key 'config' that is no option"),
        ("port = ", "is no TOML"),
        ("'--host' = 'x'", "that is no option"),
    ],
)
def test_a_mistake_is_named_with_its_key(config: Path, text: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(text)
    assert sentence in refused(capsys, f"--config={config}")


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.toml cannot be read: No such file" in refused(capsys, f"--config={tmp_path / 'none.toml'}")
