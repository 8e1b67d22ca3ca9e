"""Cases that were wrong once, from `python -m tests.fuzz`: equal now, or refused by a sentence."""

import pytest
import torch

from export import source
from tests import fuzz


@pytest.mark.parametrize(
    "number", range(len(fuzz.recorded())), ids=lambda number: f"{number}-{fuzz.recorded()[number].model_type}"
)
def test_a_case_that_was_wrong_is_equal_or_refused(number: int) -> None:
    torch.set_num_threads(1)
    result = fuzz.run(fuzz.recorded()[number])
    assert result.verdict == fuzz.recorded()[number].expected, result.detail


def test_cases_depend_on_their_seeds_alone() -> None:
    assert [fuzz.case(seed) for seed in range(20)] == [fuzz.case(seed) for seed in range(20)]
    kinds = {
        rope["rope_type"]
        for seed in range(300)
        if (rope := fuzz.case(seed).changes.get("rope_parameters")) and "rope_type" in rope
    }
    assert kinds >= {"default", "linear", "dynamic", "yarn", "longrope", "llama3"}


def test_a_wrong_engine_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is the model that was saved, so a fault in loading counts, too."""
    real = source.load

    def other(*what: object, **how: object) -> object:
        model = real(*what, **how)  # type: ignore[arg-type]
        next(model.parameters()).data.mul_(1.5)
        return model

    monkeypatch.setattr(source, "load", other)
    assert fuzz.run(fuzz.Case("llama", {})).verdict == "wrong"
