"""TLS for the listening socket: 1.2 and newer."""

import ssl
from pathlib import Path
from typing import NoReturn

from server.supervision.process import ServeError


class TlsError(ServeError):
    """The certificate and its key cannot be used."""


def ssl_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """What serves TLS with a PEM `certificate`, its chain below it, and the `key` that belongs to it.

    Raises TlsError, which names the file at fault.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _readable(certificate, "certificate")
    _readable(key, "key")

    def encrypted() -> NoReturn:  # OpenSSL would ask the terminal.
        raise TlsError(f"the key {key} is encrypted; write it without a passphrase, readable by its owner alone")

    try:
        context.load_cert_chain(certificate, key, password=encrypted)
    except ssl.SSLError as error:
        raise TlsError(_explain(error, certificate, key)) from None
    return context


def _readable(path: Path, what: str) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise TlsError(f"the {what} {path} cannot be read ({error.strerror})") from None


def _explain(error: ssl.SSLError, certificate: Path, key: Path) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"the key {key} does not belong to the certificate {certificate}; name the two that were issued together"
    try:
        ssl.create_default_context(cafile=certificate)
    except ssl.SSLError:
        return f"{certificate} is no certificate in PEM, or it is damaged ({error.reason or error})"
    return f"OpenSSL does not take {key} as the private key of {certificate} ({error.reason or error}); it has to be PEM"
