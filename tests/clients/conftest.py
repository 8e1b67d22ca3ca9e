"""What a person types into a client to point it at a server that runs; `tests/clients/run.py` starts it."""

import os

import pytest


@pytest.fixture(scope="session")
def url() -> str:
    """The server, without a path."""
    return os.environ["ENGINESHED_URL"]


@pytest.fixture(scope="session")
def key() -> str:
    """An API key of the server, which takes none without."""
    return os.environ["ENGINESHED_API_KEY"]


@pytest.fixture(scope="session")
def model() -> str:
    """The model that it serves."""
    return os.environ["ENGINESHED_MODEL"]
