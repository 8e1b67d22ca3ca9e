"""Server-sent events, as a test reads them."""

import json
from typing import Any


def named(stream: str) -> list[tuple[str, Any]]:
    """Each event's name and its data; `message` where it has no name, as browsers call it."""
    found = []
    for block in stream.removesuffix("\n\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((lines.get("event", "message"), json.loads(lines["data"])))
    return found
