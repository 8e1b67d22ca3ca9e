"""How far an export is: shares that only grow, reach one, and move with the work; and the time that is left."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from export import batches, cli, decoder, encoder, source
from export.pipeline import Stage
from export.recipe import ModelReference
from export.sentence import Sentence
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
    assert shares[-1] == 1
    assert len(set(shares)) >= least
    assert max(after - before for before, after in zip([0.0, *shares], [*shares, 1.0], strict=True)) < 0.5


def test_given_a_trace_and_a_quantization_when_they_run_then_their_shares_move_with_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("export.trace_progress.MIN_INTERVAL", 0.0)
    model = one_layer()
    traced: list[float] = []
    quantized: list[float] = []
    graph = decoder.trace(model, decoder.survey(model), share=traced.append)
    check(traced, least=100)
    assert sum(0.25 < share < 0.75 for share in traced) > 30, "it moves while graphs are interpreted"
    assert sum(0.78 < share < 1 for share in traced) > 30, "it moves while rules are tried"
    batches.quantize_both(graph, 4, tiny.VOCAB, quantized.append)
    check(quantized, least=10)


def test_given_an_encoders_trace_when_it_runs_then_its_share_reaches_one() -> None:
    model, pooled = one_layer().model, Sentence("mean")
    shares: list[float] = []
    encoder.trace(model, pooled, encoder.survey(model, pooled), shares.append)
    check(shares, least=5)


def test_given_a_trace_that_fails_when_it_ends_then_nothing_is_watched_any_more() -> None:
    before = torch.fx.Interpreter.run_node
    model = one_layer()
    seen = decoder.survey(model)
    seen.layers.pop()
    shares: list[float] = []
    with pytest.raises(Exception, match="cannot be traced"):
        decoder.trace(model, seen, share=shares.append)
    assert torch.fx.Interpreter.run_node is before
    assert 1.0 not in shares
    told = list(shares)
    torch.nn.Linear(1, 1)(torch.ones(1, 1))
    assert shares == told


def test_given_a_folder_when_fetched_and_loaded_then_both_tell_their_share(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "BLOCK", 10_000)
    hashed: list[float] = []
    loaded: list[float] = []
    checkpoint = source.fetch(ModelReference(path=str(tiny_model)), Path("cache"), share=hashed.append)
    check(hashed, least=10)
    source.load(checkpoint, share=loaded.append)
    check([*loaded, 1.0], least=10)


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
