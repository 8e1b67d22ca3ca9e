"""The address that the HTTP processes share: `SO_REUSEPORT` has the kernel give each of them its part of the connections."""

import socket

from server.supervision.process import ServeError


class ListenError(ServeError):
    """The address cannot be listened on."""


def reserve(host: str, port: int) -> socket.socket:
    """Hold `host`:`port` for the HTTP processes, which listen there; port 0 takes a free one. Raises ListenError.

    The socket never listens, so no connection reaches it. It keeps the port while a process is replaced.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family) as alone:  # Sharing would succeed beside another server that shares as well.
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
            address = alone.getsockname()
        held = socket.socket(family)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(address)
        except BaseException:
            held.close()
            raise
    except OSError as error:
        raise ListenError(f"cannot listen on {host}:{port} ({error.strerror}); choose with --host and --port") from error
    return held
