"""The named families through a real engine: transformers' own greedy tokens, in chunks, ragged, past the window."""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from tests import families

NAMED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "olmo2",
    "smollm3",
    "granite",
    "starcoder2",
    "falcon",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "phi3, longrope",
    "llama, dynamic",
    "llama4_text",
)
SLIDING = {
    *("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "starcoder2", "qwen3_moe", "mixtral"),
    "gpt_oss",
}
EXPLICIT = {"falcon"}


def export_and_compare(model_type: str) -> families.Comparison:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return families.compare(families.model(model_type), Path(folder))


@pytest.fixture(scope="module")
def comparisons(request: pytest.FixtureRequest) -> Iterator[dict[str, "Future[families.Comparison]"]]:
    """Of the families asked for: each is several seconds of tracing on one core, so every core takes some."""
    names = {
        item.callspec.params["model_type"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_greedy_tokens_are_those_of_transformers"
    }
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in whatever state they are
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=spawn) as pool:
        yield {name: pool.submit(export_and_compare, name) for name in NAMED if name in names}


@pytest.mark.parametrize("model_type", NAMED)
def test_greedy_tokens_are_those_of_transformers(
    model_type: str, comparisons: dict[str, "Future[families.Comparison]"]
) -> None:
    seen = comparisons[model_type].result()

    assert seen.different == ()
    assert seen.ties <= 1
    assert seen.tokens == (len(families.PROMPTS) + 1) * families.TOKENS
    assert (seen.fused == 0) == (model_type in EXPLICIT)


@pytest.mark.parametrize("model_type", NAMED)
def test_the_tiny_model_would_show_a_mistake(model_type: str) -> None:
    """A model that answers the same whatever it was asked, or never looks past its window, proves nothing."""
    model = families.model(model_type)
    prompt = families.prompts(families.VOCAB)[-1]
    changed = [prompt[0] + 1, *prompt[1:]]

    plain, other = families.logits(model, prompt), families.logits(model, changed)

    spread = plain.max() - plain.min()
    moved = (plain - other).abs().amax(-1) / spread
    assert moved[: families.WINDOW].min() > 100 * families.TIE
    assert len(set(plain.argmax(-1).tolist())) >= 6
    assert any(kind == "sliding_attention" for kind in _layer_types(model)) == (model_type in SLIDING)


def _layer_types(model: torch.nn.Module) -> list[str]:
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    kinds = getattr(config, "layer_types", None)
    if kinds is None and getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"]
    return list(kinds or [])
