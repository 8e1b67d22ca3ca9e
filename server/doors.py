"""Where an HTTP process listens, whom it lets in and for how long: what the supervisor tells it at its start."""

import msgspec


class Limits(msgspec.Struct, frozen=True):
    """How long a request may take, in seconds; 0 sets no limit."""

    queue_seconds: float = 0.0
    """Until it gets a slot, the loading of its model included."""
    total_seconds: float = 0.0
    """Until its last token."""

    def after(self, seconds: float) -> "Limits":
        """What is left after `seconds`; a limit that has been reached leaves next to nothing, not none."""

        def less(limit: float) -> float:
            return max(limit - seconds, 0.001) if limit else 0.0

        return Limits(less(self.queue_seconds), less(self.total_seconds))


class Doors(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses, keys and certificates; only text, so that nothing is imported for it."""

    host: str
    port: int
    keys: str | None = None
    """The file of API keys; None needs none."""
    protect_metrics: bool = False
    origins: tuple[str, ...] = ()
    """Of web pages that may read answers."""
    certificate: str | None = None
    """With it comes `certificate_key`; None speaks plain HTTP."""
    certificate_key: str | None = None
    admin_socket: str | None = None
    """Path of a unix socket whose users are let in as admins, for the first of the processes."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All that an HTTP process is told at its start."""

    name: str
    """`http-0`, `http-1`, ..."""
    supervisor: str
    """The supervisor's address."""
    parent: int
    """Its process."""
    doors: Doors
    limits: Limits
    drain_seconds: float
    """What running answers get to finish when the server is told to stop."""
    waiting: int
    """Requests that may wait for models to be loaded."""
    log_level: str
    log_format: str
