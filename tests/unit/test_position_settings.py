"""What config.json says of positions twice, and differently, is refused; older names and other places of the same are not."""

from typing import Any

import pytest
from transformers import LlamaConfig, Phi3Config

from export import position_settings
from export.errors import ExportError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
            "rope_scaling.rope_type is 'yarn', and rope_parameters.rope_type is 'linear'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "rope_scaling.factor is 2.0, and rope_parameters.factor is 4.0",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 4.0}},
            "rope_scaling.type is 'linear', and rope_scaling.rope_type is 'default'",
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            "rope_scaling.original_max_position_embeddings is 128, and original_max_position_embeddings is 64",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 5e5},
            "rope_parameters.rope_theta is 10000.0, and rope_theta is 500000.0",
        ),
        (
            {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 5e5}},
            "text_config.rope_parameters.rope_theta is 10000.0, and text_config.rope_theta is 500000.0",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_with_both_entries(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ExportError) as error:
        position_settings.check(config, "config.json")
    assert str(error.value).startswith(f"config.json contradicts itself: {said}; ")


def test_a_length_that_transformers_does_not_take_is_refused() -> None:
    scaling: dict[str, Any] = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    entries: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "rope_scaling": scaling,
    }
    config = entries | {"original_max_position_embeddings": 128}
    with pytest.raises(
        ExportError, match=r"original_max_position_embeddings 128, and transformers takes 1024: it looks for it"
    ):
        position_settings.check_loaded(config, LlamaConfig(**config), "config.json")
    position_settings.check_loaded(config, Phi3Config(**config, pad_token_id=0), "config.json")
    inside = entries | {"rope_scaling": scaling | {"original_max_position_embeddings": 128}}
    position_settings.check_loaded(inside, LlamaConfig(**inside), "config.json")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_scaling": None, "rope_theta": 1e4},
        {"rope_scaling": {"type": "su", "rope_type": "longrope"}, "original_max_position_embeddings": 4096},
        {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 2]}},
        {"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 1e4}, "rope_theta": 1e4},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta": 1e4},
    ],
)
def test_what_says_one_thing_is_taken(config: dict[str, Any]) -> None:
    position_settings.check(config, "config.json")
