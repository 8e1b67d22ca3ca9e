"""The API key that the terminal's commands send."""

import os

VARIABLE = "ENGINESHED_API_KEY"
"""The environment's variable that holds it; a command line would show it to everybody on the machine."""


def headers() -> dict[str, str]:
    """The header with the key, if there is one."""
    key = os.environ.get(VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}
