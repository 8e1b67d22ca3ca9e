"""How far an export is: shares that only grow, reach one, and move with the work; and the time that is left."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from export import cli, decoder, source
from export.errors import UnsupportedModel
from export.stage import Stage
from tests import tiny


def one_layer() -> LlamaForCausalLM:
    """The tiny model, half as deep."""
    configuration = tiny.configuration()
    configuration.num_hidden_layers = 1
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM(configuration).eval()
    return model


def check(shares: list[float], least: int) -> None:
    """They only grow, from next to nothing to all, in `least` steps and more."""
    assert shares == sorted(shares)
    assert 0.999 < shares[-1] <= 1
    assert len(set(shares)) >= least
    assert max(after - before for before, after in zip([0.0, *shares], [*shares, 1.0], strict=True)) < 0.5


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, list[float]]:
    """What each stage of an export told of its share."""
    heard = tiny.Silent()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.trace_progress.MIN_INTERVAL", 0.0)
        patch.setattr(source, "BLOCK", 10_000)
        engines = tmp_path_factory.mktemp("engines")
        tiny.exporting(engines, text=tiny.TEXT, progress=heard).run(tiny.recipe(tiny_model))
    return heard.shares


@pytest.mark.parametrize(
    ("stage", "least"),
    [
        ("fetch", 10),
        ("trace", 100),
        ("cpu-int4: compile", 20),
        ("cpu-fp32: verify", 10),
        ("cpu-fp32: perplexity", 4),
        ("cpu-int4: verify", 10),
    ],
)
def test_given_an_export_when_it_runs_then_its_stages_tell_how_much_is_done(
    shares: dict[str, list[float]], stage: str, least: int
) -> None:
    check(shares[stage], least)


def test_given_a_model_when_loaded_then_each_weight_is_a_step(shares: dict[str, list[float]]) -> None:
    check([*shares["load"], 1.0], least=20)


def test_given_a_trace_when_it_runs_then_its_share_moves_in_each_of_its_parts(shares: dict[str, list[float]]) -> None:
    traced = shares["trace"]
    assert sum(share < 0.25 for share in traced) > 10, "modules run"
    assert sum(0.25 < share < 0.75 for share in traced) > 30, "graphs are interpreted"
    assert sum(0.78 < share < 1 for share in traced) > 30, "rules are tried"


def test_given_a_trace_that_fails_when_it_ends_then_nothing_is_watched_any_more() -> None:
    before = torch.fx.Interpreter.run_node
    model = one_layer()
    seen = decoder.survey(model)
    seen.layers.pop()
    heard: list[float] = []
    with pytest.raises(UnsupportedModel, match="cannot be traced"):
        decoder.trace(model, seen, share=heard.append)
    assert torch.fx.Interpreter.run_node is before
    assert 1.0 not in heard
    told = list(heard)
    torch.nn.Linear(1, 1)(torch.ones(1, 1))
    assert heard == told


def test_given_a_share_that_falls_when_told_then_the_stage_stays_where_it_was() -> None:
    heard = tiny.Silent()
    stage = Stage("x", heard)
    for share in (0.1, 0.5, 0.3, 0.6, 1.2):
        stage.advance(share)
    assert heard.shares == {"x": [0.1, 0.5, 0.5, 0.6, 1.0]}


@pytest.mark.parametrize(
    ("share", "seconds", "expected"),
    [
        (0.5, 10, "10 s left"),
        (0.25, 20, "60 s left"),
        (0.1, 60, "9 min left"),
        (0.99, 10, "1 s left"),
        (0.01, 60, ""),
        (0.5, 0.5, ""),
        (1.0, 60, ""),
    ],
)
def test_given_a_share_and_a_time_when_shown_then_the_rest_is_told_where_it_can_be(
    share: float, seconds: float, expected: str
) -> None:
    assert cli.remaining(share, seconds) == expected
