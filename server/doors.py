"""Where the server listens, whom it lets in and for how long, as the command line says it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """How long a request may take, in seconds; 0 sets no limit."""

    queue_seconds: float = 0.0
    """Until it gets a slot."""
    total_seconds: float = 0.0
    """Until its last token."""


@dataclass(frozen=True)
class Doors:
    """Addresses, keys and certificates; only paths and names, so that nothing is imported for it."""

    host: str
    port: int
    """0 takes a free one."""
    keys: Path | None = None
    """The file of API keys; None needs none."""
    protect_metrics: bool = False
    origins: frozenset[str] = frozenset()
    """Of web pages that may read answers."""
    certificate: Path | None = None
    """With it comes `certificate_key`; None speaks plain HTTP."""
    certificate_key: Path | None = None
