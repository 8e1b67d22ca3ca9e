"""What the server withstands: names that mean paths, bodies that mean harm, web pages of others, and the wrong certificates."""

import asyncio
import json
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from server import app, cors, keys
from server.access import Access
from server.cors import OriginError
from server.keys import Keys
from server.tls import TlsError, ssl_context
from tests.unit.server.house import House
from tests.waiting import HANGS_SECONDS

PAGE = "https://example.org"
ASKING = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,x-stainless-os",
}

_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir"):
        _opened.append(repr(arguments))


sys.addaudithook(_note)  # which stays for the process' life


@contextmanager
def files_opened() -> Iterator[list[str]]:
    """The files and folders that this process opens within the context."""
    global _opened
    found: list[str] = []
    _opened = found
    try:
        yield found
    finally:
        _opened = None


@asynccontextmanager
async def serving(
    house: House, access: Access, context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[aiohttp.ClientSession, int]]:
    """The application under `access`, a client of it, and its port."""
    runner = app.runner(app.build(house.service, access))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession(f"http{'s' if context else ''}://127.0.0.1:{port}") as http:
        yield http, port
    await runner.cleanup()


async def raw(port: int | None, target: bytes, headers: bytes = b"", method: bytes = b"GET") -> tuple[int, bytes, bytes]:
    """Status, head and body of the answer to a request that no client has tidied up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(method + b" " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + headers + b"\r\n")
    answer = await asyncio.wait_for(reader.read(), HANGS_SECONDS)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, body


async def port_of(house: House) -> int | None:
    """Where `house` listens."""
    async with house.http.get("/healthz") as response:
        return response.url.port


HOSTILE = [
    "..",
    "../tiny",
    "../../../../etc/passwd",
    "/etc/passwd",
    "tiny/../../x",
    "tiny/",
    "./tiny",
    "tiny\x00",
    "tiny\x00.json",
    "..\\..\\x",
    "%2e%2e/%2e%2e/etc/passwd",
    "file:///etc/passwd",
    "~root",
    "",
    "\u202e",
    "a" * 5000,
]


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_model_that_is_a_path_is_not_found_and_no_file_is_touched(house: House, name: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/generate"):
        body = {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "model": name}
        with files_opened() as opened:
            async with house.http.post(path, json=body) as response:
                assert response.status == 404
                assert (await response.json())["error"]["code"] == "model_not_found"
        assert not opened
    assert house.worker.received.empty()


@pytest.mark.parametrize(
    "rest",
    [
        b"..",
        b"../models",
        b"../../../../etc/passwd",
        b"%2e%2e/%2e%2e/etc/passwd",
        b"%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        b"..%5c..%5cx",
        b"tiny%00",
        b"tiny/..",
        b"%252e%252e%252f",
        b"%ff%fe",
        b"%ed%a0%80",
        b"/etc/passwd",
        b"%",
        b"%zz",
    ],
)
async def test_a_url_that_climbs_is_not_found_and_no_file_is_touched(house: House, rest: bytes) -> None:
    port = await port_of(house)
    for prefix in (b"/v1/models/", b"/v1/", b"/", b"/healthz/"):
        with files_opened() as opened:
            status, _, body = await raw(port, prefix + rest)
        assert status in (400, 404), (prefix, body)
        if status == 404:
            assert json.loads(body)["error"]["code"] in ("model_not_found", "unknown_url")
        assert not opened


async def test_a_nul_in_the_request_line_is_no_http(house: House) -> None:
    status, _, _ = await raw(await port_of(house), b"/v1/models/tiny\x00")
    assert status == 400


async def test_the_hook_notices_a_file(tmp_path: Path) -> None:
    with files_opened() as opened:
        (tmp_path / "x").write_text("x")
    assert opened


DEEP = 50_000


@pytest.mark.parametrize("pair", ["[]", "{}"])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize(
    "field", ["unknown", "prompt", "messages", "tools", "logit_bias", "stop", "response_format", "stream_options", "model"]
)
async def test_json_that_is_nested_too_deeply_is_400_wherever_it_stands(
    house: House, field: str, closed: bool, pair: str
) -> None:
    opening, closing = ("[", "]") if pair == "[]" else ('{"a":', "}")
    inner = opening * DEEP + ("0" + closing * DEEP if closed else "")
    for path, known in [
        ("/v1/chat/completions", '"messages": [{"role": "user", "content": "hi"}]'),
        ("/v1/completions", '"prompt": "hi"'),
        ("/v1/generate", '"prompt": "hi"'),
    ]:
        body = f'{{{known}, "{field}": {inner}{"}" if closed else ""}'
        async with house.http.post(path, data=body.encode()) as response:
            assert response.status == 400
            assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_other_origins_are_told_nothing_by_default(house: House) -> None:
    async with house.http.options("/v1/completions", headers=ASKING) as response:
        assert response.status == 405
        assert not [name for name in response.headers if name.startswith("Access-Control")]
    async with house.http.get("/v1/models", headers={"Origin": PAGE}) as response:
        assert response.status == 200
        assert not [name for name in response.headers if name.startswith("Access-Control")]


async def test_a_named_origin_may_ask_and_read_and_its_preflight_needs_no_key(house: House, tmp_path: Path) -> None:
    entry, key = keys.new("alice")
    keys.update(tmp_path / "keys.toml", lambda _: [entry])
    access = Access(keys=Keys(tmp_path / "keys.toml"), origins=frozenset({PAGE, "http://localhost:3000"}))
    async with serving(house, access) as (http, _):
        async with http.options("/v1/completions", headers=ASKING) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == PAGE
            assert response.headers["Access-Control-Allow-Methods"] == "GET, POST"
            assert response.headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
            assert "Access-Control-Allow-Credentials" not in response.headers
        async with http.get("/v1/models", headers={"Origin": PAGE, "Authorization": f"Bearer {key}"}) as response:
            assert response.status == 200
            assert response.headers["Access-Control-Allow-Origin"] == PAGE
            exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
            assert {"X-Request-Id", "request-id", "Retry-After"} == set(exposed)
        async with http.get("/v1/models", headers={"Origin": PAGE}) as response:
            assert response.status == 401
            assert response.headers["Access-Control-Allow-Origin"] == PAGE, "so that the page can read why"


@pytest.mark.parametrize("origin", ["https://evil.example", f"{PAGE}.evil", "null", "HTTPS://EXAMPLE.ORG", f"{PAGE}:8443", ""])
async def test_another_origin_than_the_named_may_not(house: House, origin: str) -> None:
    async with serving(house, Access(origins=frozenset({PAGE}))) as (http, _):
        async with http.options("/v1/completions", headers={**ASKING, "Origin": origin}) as response:
            assert response.status == 204
            assert not [name for name in response.headers if name.startswith("Access-Control")]
        async with http.get("/v1/models", headers={"Origin": origin}) as response:
            assert "Access-Control-Allow-Origin" not in response.headers
            assert response.headers["Vary"] == "Origin", "or a cache would give this answer to a page that may"


async def test_any_origin_may_where_that_is_wanted_and_streams_say_so(house: House) -> None:
    async with serving(house, Access(origins=frozenset({cors.ANY}))) as (http, _):
        async with http.options("/v1/completions", headers=ASKING) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "*"
        house.http = http
        answer, request = await house.open("/v1/generate", {"prompt": "hi"}, "Hello", {"Origin": "null"})
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        await house.worker.say(request, "!", "stop")
        assert await answer.text() == "Hello!"


async def test_a_preflight_gives_nothing_back_that_is_no_header_name(house: House) -> None:
    asking = b"Origin: x\r\nAccess-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: a\xff\r\n"
    async with serving(house, Access(origins=frozenset({cors.ANY}))) as (_, port):
        status, head, _ = await raw(port, b"/v1/completions", asking, b"OPTIONS")
    assert status == 204
    assert b"Access-Control-Allow-Headers" not in head


async def test_options_without_a_preflights_headers_is_an_ordinary_wrong_method(house: House) -> None:
    async with (
        serving(house, Access(origins=frozenset({cors.ANY}))) as (http, _),
        http.options("/v1/completions") as response,
    ):
        assert response.status == 405


@pytest.mark.parametrize("text", ["*", PAGE, "http://127.0.0.1:3000", "http://[::1]:3000", "chrome-extension://abc"])
def test_an_origin_is_taken(text: str) -> None:
    assert cors.parse(text) == text


def test_an_origin_is_compared_as_browsers_write_it() -> None:
    assert cors.parse("HTTPS://Example.org") == PAGE


@pytest.mark.parametrize(
    "text", ["", "example.org", f"{PAGE}/", f"{PAGE}/page", "https://*.example.org", "null", f"{PAGE}\n", "https://a b"]
)
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(OriginError, match="is no origin"):
        cors.parse(text)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with localhost.pem and its key, another key, and the first one encrypted."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl command to make certificates with")
    folder = tmp_path_factory.mktemp("tls")

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    for name in ("localhost", "other"):
        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
        run("req", "-x509", *new, *names, "-days", "2", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    run("pkcs8", "-topk8", "-in", "localhost.key", "-passout", "pass:secret", "-out", "encrypted.key")
    return folder


async def test_tls_serves_1_2_and_newer_and_nothing_older(house: House, certificates: Path) -> None:
    context = ssl_context(certificates / "localhost.pem", certificates / "localhost.key")
    trusting = ssl.create_default_context(cafile=certificates / "localhost.pem")
    async with serving(house, Access(), context) as (http, port):
        async with http.get("/healthz", ssl=trusting) as response:
            assert response.status == 200
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_2
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=old)
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.2"
        writer.transport.abort()
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", port, ssl=old)


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        ("none.pem", "localhost.key", r"the certificate .*none\.pem cannot be read \(No such file"),
        ("localhost.pem", "none.key", r"the key .*none\.key cannot be read \(No such file"),
        ("localhost.pem", "other.key", r"other\.key does not belong to the certificate .*localhost\.pem"),
        ("localhost.pem", "encrypted.key", r"encrypted\.key is encrypted"),
        ("localhost.key", "localhost.key", r"localhost\.key is no certificate"),
        ("localhost.pem", "localhost.pem", r"does not take .*localhost\.pem as the private key"),
    ],
)
def test_files_that_are_no_pair_are_told_apart(certificates: Path, certificate: str, key: str, says: str) -> None:
    with pytest.raises(TlsError, match=says):
        ssl_context(certificates / certificate, certificates / key)
