"""A Hugging Face hub on this machine: the answers that huggingface_hub asks for, over HTTP, from a folder."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789" * 4
"""The only commit of every repository; `main` and `v1` stand for it."""


@contextmanager
def serving(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """While this lasts the hub is `folder`, whose folders ORG/NAME are its repositories; gives the paths that were fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            steps = self.path.partition("?")[0].strip("/").split("/")
            if steps[:2] == ["api", "models"]:
                self._tell(folder / "/".join(steps[2:4]), *(steps[4:6] or ("revision", "main")))
            else:
                fetched.append("/".join(steps[4:]))
                self._give(folder / "/".join(steps[:2]) / fetched[-1])

        def do_HEAD(self) -> None:
            steps = self.path.strip("/").split("/")
            self._give(folder / "/".join(steps[:2]) / "/".join(steps[4:]))

        def _tell(self, repository: Path, what: str, revision: str) -> None:
            if not repository.is_dir():
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            if revision not in ("main", "v1", COMMIT):
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            files = [path for path in sorted(repository.rglob("*")) if path.is_file()]
            names = [str(path.relative_to(repository)) for path in files]
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": path.name}
                for name, path in zip(names, files, strict=True)
            ]
            told = {
                "id": "/".join(repository.parts[-2:]),
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in names],
            }
            self._answer(200, json.dumps(tree if what == "tree" else told).encode(), {"Content-Type": "application/json"})

        def _give(self, file: Path) -> None:
            if file.is_file():
                self._answer(200, file.read_bytes(), {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT})
            else:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})

        def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            patch.setattr("huggingface_hub.constants.ENDPOINT", address)
            patch.setattr(
                "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
            )
            patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
            yield fetched
        server.shutdown()
