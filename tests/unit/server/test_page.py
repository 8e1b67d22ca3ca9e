"""How the page's files are served: from memory, to anybody, and under a policy that lets them do nothing else."""

import re
from pathlib import Path

import pytest

from server import keys
from server.access import OPEN, Access
from server.keys import Keys
from server.page import site
from tests.unit.server.house import House
from tests.unit.server.test_security import files_opened, serving

PATHS = ["/", "/docs", "/favicon.svg", *(f"/page/{name}" for name in site.files())]


@pytest.mark.parametrize("path", PATHS)
async def test_a_file_comes_with_its_type_its_tag_and_a_strict_policy(house: House, path: str) -> None:
    async with house.http.get(path) as response:
        assert response.status == 200
        name = {"/": "index.html", "/docs": "docs.html"}.get(path, path.rpartition("/")[2])
        assert response.content_type == site.MEDIA[Path(name).suffix]
        assert response.charset == "utf-8"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert response.headers["Cache-Control"] == "no-cache"
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        tag = response.headers["ETag"]
        body = await response.read()
    async with house.http.get(path, headers={"If-None-Match": tag}) as response:
        assert (response.status, await response.read()) == (304, b"")
        assert response.headers["ETag"] == tag
    async with house.http.get(path, headers={"If-None-Match": '"another"'}) as response:
        assert (response.status, await response.read()) == (200, body)
    async with house.http.head(path) as response:
        assert (response.status, response.content_length) == (200, len(body))


async def test_files_are_read_once(house: House) -> None:
    with files_opened() as opened:
        for path in PATHS:
            async with house.http.get(path) as response:
                assert response.status == 200
    assert [arguments for arguments in opened if "server/page" in arguments] == []


@pytest.mark.parametrize(
    "name", ["../app.py", "..%2fapp.py", "%2e%2e%2fapp.py", "site.py", "__init__.py", "/etc/passwd", "x.js"]
)
async def test_nothing_else_is_served(house: House, name: str) -> None:
    async with house.http.get(f"/page/{name}") as response:
        assert response.status == 404
        assert response.content_type == "application/json"


async def test_the_page_needs_no_key_and_the_interface_does(house: House, tmp_path: Path) -> None:
    entry, _ = keys.new("alice")
    keys.update(tmp_path / "keys.toml", lambda others: [*others, entry])
    async with serving(house, Access(Keys(tmp_path / "keys.toml"))) as (http, port):
        for path in PATHS:
            async with http.get(f"http://127.0.0.1:{port}{path}") as response:
                assert response.status == 200
        for path in ("/v1/models", "/openapi.json", "/admin/status"):
            async with http.get(f"http://127.0.0.1:{port}{path}") as response:
                assert response.status == 401


def test_what_the_files_refer_to_is_there_and_here() -> None:
    files = site.files()
    for name, file in files.items():
        text = file.body.decode()
        for found in re.findall(r'(?:from|import) "\./([^"]+)"', text):
            assert found in files, f"{name} imports {found}"
        for found in re.findall(r'(?:src|href)="(/[^"#]*)', text):
            assert found in app_paths(), f"{name} refers to {found}"
        assert "style=" not in text, f"{name} has a style that the policy forbids"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), name
        elsewhere = re.findall(r'(?:src|href|url|fetch|import)[=("\s]+https?://[^"\s)]+', text)
        assert elsewhere == [], f"{name} refers to another origin"


def app_paths() -> set[str]:
    """Every path without a parameter, and the page's files."""
    return {*PATHS, "/openapi.json"}


def test_every_route_of_the_page_is_open() -> None:
    assert set(site.PATHS) == {route.path for route in site.routes()}
    assert set(site.PATHS) <= set(OPEN)
