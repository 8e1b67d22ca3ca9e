"""The default model's bundle as the tests take it, or with the variable TEST_ENGINES another folder's of the same name.

See tests/quick_model.py for one that makes the server ten times as fast.
"""

import os
from pathlib import Path

import pytest

MODEL = "smollm2-135m-instruct"
PUBLISHED = Path(__file__).parents[1] / "engines"
"""Where `engineshed export` leaves the real one."""
ENGINES = Path(os.environ.get("TEST_ENGINES") or PUBLISHED).absolute()
STANDS_IN = ENGINES != PUBLISHED
"""Another model answers under the default model's name."""

MANY_TOKENS = 2000 if STANDS_IN else 400
"""Of an answer that must not have ended before a test has looked at it."""


def real(why: str) -> pytest.MarkDecorator:
    """Skip where another model stands in for the real one, on whose words the test depends as `why` says."""
    return pytest.mark.skipif(STANDS_IN, reason=f"a stand-in answers with any words, and {why}")


def says(text: str | None, word: str) -> bool:
    """Whether the answer `text` has the `word` that the real model says; of a stand-in nothing is expected."""
    return STANDS_IN or word in (text or "")
