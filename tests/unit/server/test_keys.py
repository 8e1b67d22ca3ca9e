"""API keys: the file, the command that writes it, and what each key opens."""

import argparse
import asyncio
import hmac
import logging
import os
import stat
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from server import app, keys, keys_cli
from server.access import CLIENT, Access, require_admin
from server.keys import Keys, KeysError
from server.service import Service
from tests.unit.server.house import House
from tests.waiting import HANGS_SECONDS

PROTECTED = ["/v1/models", "/v1/models/tiny", "/v1/nothing"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def add(path: Path, name: str, *, priority: int = 0, admin: bool = False) -> str:
    """Put a key into the file and give it."""
    entry, key = keys.new(name, priority=priority, admin=admin)
    keys.update(path, lambda present: [*present, entry])
    return key


def command(*line: str) -> int:
    """`engineshed keys` with these arguments."""
    parser = argparse.ArgumentParser()
    keys_cli.configure(parser)
    return keys_cli.run(parser.parse_args(line))


def test_a_key_is_found_by_itself_alone(path: Path) -> None:
    alice, bob = add(path, "alice", priority=-5), add(path, "bob", admin=True)
    known = Keys(path)
    found = known.find(alice)
    assert found is not None
    assert (found.name, found.priority, found.admin) == ("alice", -5, False)
    found = known.find(bob)
    assert found is not None
    assert (found.name, found.admin) == ("bob", True)
    for wrong in ("", alice[:-1], alice + "x", alice.upper(), found.sha256, "\udcff", "ä"):
        assert known.find(wrong) is None


def test_the_file_holds_no_key_and_equal_keys_look_different(path: Path) -> None:
    key = add(path, "alice")
    assert key not in path.read_text()
    assert len(key.removeprefix("es-")) == 43, "256 bits in base64"
    first, second = keys._hash("00" * 16, b"same"), keys._hash("01" * 16, b"same")
    assert first != second


def test_every_entry_is_compared_whichever_matches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = add(path, "first"), [add(path, f"k{number}") for number in range(5)][-1]
    compared: list[str] = []
    original = hmac.compare_digest

    def comparing(one: str, other: str) -> bool:
        compared.append(other)
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", comparing)
    for presented in (first, last, "wrong"):
        compared.clear()
        Keys(path).find(presented)
        assert len(compared) == 6


def test_the_file_is_its_owners_alone_and_replaced_whole(path: Path, tmp_path: Path) -> None:
    add(path, "alice")
    os.chmod(path, 0o644)
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    add(link, "bob")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert link.is_symlink()
    assert [key.name for key in keys.read(path)] == ["alice", "bob"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["keys.toml", "link.toml"]


def test_a_change_that_fails_leaves_the_file_and_nothing_beside_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(path, "alice")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeysError, match="No space left"):
        add(path, "bob")
    assert [key.name for key in keys.read(path)] == ["alice"]
    assert [file.name for file in tmp_path.iterdir()] == ["keys.toml"]


ENTRY = f'[[keys]]\nname = "a"\nsalt = "{"0" * 32}"\nsha256 = "{"0" * 64}"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[[keys", "is no TOML"),
        (b"\xff", "not UTF-8"),
        (b"[[key]]\n", "unknown field `key`"),
        (ENTRY.encode() + b"pirority = 1\n", r"unknown field `pirority`.*keys\[0\]"),
        (ENTRY.encode() + b"priority = 101\n", r"keys\[0\]\.priority"),
        (ENTRY.replace("0" * 64, "0" * 63).encode(), r"keys\[0\]\.sha256"),
        (ENTRY.replace('"a"', '"a b"').encode(), r"keys\[0\]\.name"),
        (ENTRY.encode() * 2, "several keys with the name 'a'"),
    ],
)
def test_a_damaged_file_is_told_with_what_is_wrong(path: Path, text: bytes, says: str) -> None:
    path.write_bytes(text)
    with pytest.raises(KeysError, match=f"(?s){path}.*{says}"):
        Keys(path)


def test_a_file_that_is_not_there_is_told_with_how_to_make_one(path: Path) -> None:
    with pytest.raises(KeysError, match="engineshed keys add NAME --file"):
        Keys(path)


def test_a_file_that_others_can_read_and_one_without_keys_are_warned_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(path, "alice")
    Keys(path)
    assert not caplog.records
    os.chmod(path, 0o640)
    Keys(path)
    assert f"chmod 600 {path}" in caplog.text
    path.write_text("")
    Keys(path)
    assert "every request is refused" in caplog.text


def test_reloading_takes_new_keys_and_drops_removed_ones(path: Path) -> None:
    alice = add(path, "alice")
    known = Keys(path)
    keys.update(path, lambda present: [])
    bob = add(path, "bob")
    assert known.find(bob) is None
    assert known.reload()
    assert known.find(bob) is not None
    assert known.find(alice) is None


@pytest.mark.parametrize("damage", [lambda path: path.write_text("[["), lambda path: path.unlink()])
def test_reloading_a_damaged_file_keeps_the_keys_and_logs_why(
    path: Path, damage: "object", caplog: pytest.LogCaptureFixture
) -> None:
    alice = add(path, "alice")
    known = Keys(path)
    assert callable(damage)
    damage(path)
    assert not known.reload()
    assert known.find(alice) is not None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "the 1 keys read before stay valid" in caplog.text


def test_the_command_adds_lists_and_removes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("add", "alice", "--priority", "-3", "--file", str(path)) == 0
    shown = capsys.readouterr()
    assert command("add", "root", "--admin", "--file", str(path)) == 0
    found = Keys(path).find(shown.out.strip())
    assert found is not None
    assert found.name == "alice"
    assert "SIGHUP" in shown.err
    capsys.readouterr()
    assert command("list", "--file", str(path)) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["name", "priority", "admin"],
        ["alice", "-3", "no"],
        ["root", "0", "yes"],
    ]
    assert command("remove", "alice", "--file", str(path)) == 0
    assert [key.name for key in keys.read(path)] == ["root"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["add", "alice"], "already"),
        (["add", "a b"], "cannot name a key"),
        (["add", 'x"\nadmin = true'], "cannot name a key"),
        (["add", "carol", "--priority", "101"], "between -100 and 100"),
        (["remove", "carol"], "which has alice"),
    ],
)
def test_the_command_refuses_what_cannot_be(path: Path, line: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    add(path, "alice")
    before = path.read_text()
    assert command(*line, "--file", str(path)) == 1
    shown = capsys.readouterr()
    assert says in shown.err
    assert not shown.out
    assert path.read_text() == before


async def raw(port: int, head: bytes) -> bytes:
    """The answer to a request's head that no client has tidied up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + b"Connection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), HANGS_SECONDS)
    writer.close()
    return answer


class Server:
    """The application under `access`, with `/admin` and `/who` of the test's own."""

    def __init__(self, service: Service, access: Access, folder: Path) -> None:
        self._app = app.build(service, access)
        self._app.router.add_get("/admin/who", self._admin)
        self._app.router.add_get("/who", self._who)
        self._socket = str(folder / "admin")

    async def __aenter__(self) -> "Server":
        self._runner = app.runner(self._app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        await web.UnixSite(self._runner, self._socket).start()
        self.port = self._runner.addresses[0][1]
        self.http = aiohttp.ClientSession(f"http://127.0.0.1:{self.port}")
        self.local = aiohttp.ClientSession("http://admin", connector=aiohttp.UnixConnector(self._socket))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.close()
        await self.local.close()
        await self._runner.cleanup()

    async def status(self, path: str, headers: dict[str, str] | None = None, *, local: bool = False) -> int:
        """The status that `path` answers with."""
        async with (self.local if local else self.http).get(path, headers=headers) as response:
            return response.status

    @staticmethod
    async def _who(request: web.Request) -> web.Response:
        client = request[CLIENT]
        return web.json_response([client.name, client.priority])

    @staticmethod
    async def _admin(request: web.Request) -> web.Response:
        require_admin(request)
        return web.json_response(request[CLIENT].name)


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer es-wrong"}, {"Authorization": "Basic YTpi"}, {"x-api-key": ""}]
)
async def test_without_a_known_key_every_route_is_401_whether_it_exists_or_not(
    house: House, path: Path, tmp_path: Path, header: dict[str, str]
) -> None:
    add(path, "alice")
    async with Server(house.service, Access(keys=Keys(path)), tmp_path) as server:
        for route in (*PROTECTED, "/admin/who"):
            async with server.http.get(route, headers=header) as response:
                error = (await response.json())["error"]
                assert (response.status, error["type"], error["code"]) == (401, "invalid_request_error", "invalid_api_key")
                assert response.headers["WWW-Authenticate"].startswith("Bearer")
                assert "wrong" not in error["message"]
        async with server.http.post("/v1/completions", json={"prompt": "hi"}, headers=header) as response:
            assert response.status == 401
    assert house.worker.received.empty()


async def test_a_key_that_is_no_utf_8_is_401(house: House, path: Path, tmp_path: Path) -> None:
    add(path, "alice")
    async with Server(house.service, Access(keys=Keys(path)), tmp_path) as server:
        answer = await raw(server.port, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n")
        assert answer.startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("header", ["Authorization: Bearer ", "authorization: bearer  ", "X-Api-Key: ", "x-goog-api-key: "])
async def test_a_key_is_taken_as_any_client_sends_it_and_names_the_client(
    house: House, path: Path, tmp_path: Path, header: str
) -> None:
    key = add(path, "alice", priority=7)
    name, _, scheme = header.partition(": ")
    async with (
        Server(house.service, Access(keys=Keys(path)), tmp_path) as server,
        server.http.get("/who", headers={name: scheme + key}) as response,
    ):
        assert await response.json() == ["alice", 7]


async def test_the_log_names_the_key_and_never_holds_it(
    house: House, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = add(path, "alice")
    with caplog.at_level(logging.DEBUG):
        async with Server(house.service, Access(keys=Keys(path)), tmp_path) as server:
            await server.status("/v1/models", {"x-api-key": key})
            await server.status("/v1/models", {"x-api-key": f"{key}x"})
    told = [record.__dict__["fields"] for record in caplog.records if record.name == "engineshed.request"]
    assert [(fields["client"], fields["status"]) for fields in told] == [("alice", 200), (None, 401)]
    assert key not in caplog.text + repr(told)


async def test_a_proxys_own_credentials_do_not_hide_the_key(house: House, path: Path, tmp_path: Path) -> None:
    key = add(path, "alice")
    async with Server(house.service, Access(keys=Keys(path)), tmp_path) as server:
        assert await server.status("/v1/models", {"Authorization": "Basic YTpi", "x-api-key": key}) == 200


async def test_health_needs_no_key_and_metrics_only_if_protected(house: House, path: Path, tmp_path: Path) -> None:
    header = {"Authorization": f"Bearer {add(path, 'alice')}"}
    async with Server(house.service, Access(keys=Keys(path)), tmp_path) as server:
        for route in ("/healthz", "/readyz", "/metrics"):
            assert await server.status(route) == 200
            assert await server.status(route, {"Authorization": "Bearer wrong"}) == 200
    async with Server(house.service, Access(keys=Keys(path), protect_metrics=True), tmp_path) as server:
        assert await server.status("/readyz") == 200
        assert await server.status("/metrics") == 401
        assert await server.status("/metrics", header) == 200


async def test_a_reloaded_key_counts_from_the_next_request_on(house: House, path: Path, tmp_path: Path) -> None:
    header = {"Authorization": f"Bearer {add(path, 'alice')}"}
    known = Keys(path)
    async with Server(house.service, Access(keys=known), tmp_path) as server:
        assert await server.status("/v1/models", header) == 200
        keys.update(path, lambda present: [])
        known.reload()
        assert await server.status("/v1/models", header) == 401


async def test_without_keys_everybody_is_served_under_no_name_and_no_admin(house: House, tmp_path: Path) -> None:
    async with Server(house.service, Access(), tmp_path) as server:
        async with server.http.get("/who", headers={"Authorization": "Bearer anything"}) as response:
            assert await response.json() == ["", 0]
        async with server.http.get("/admin/who") as response:
            assert response.status == 403
            assert (await response.json())["error"]["code"] == "admin_required"


async def test_admin_routes_open_to_admin_keys_and_over_the_unix_socket(house: House, path: Path, tmp_path: Path) -> None:
    alice, root = ({"x-api-key": key} for key in (add(path, "alice"), add(path, "root", admin=True)))
    async with Server(house.service, Access(keys=Keys(path)), tmp_path) as server:
        assert await server.status("/admin/who") == 401
        assert await server.status("/admin/who", alice) == 403
        assert await server.status("/admin/who", root) == 200
        assert await server.status("/admin/who", local=True) == 200
        assert await server.status("/admin/who", {"x-api-key": "wrong"}, local=True) == 401
    async with Server(house.service, Access(), tmp_path) as server:
        assert await server.status("/admin/who", local=True) == 200
