"""Keys, their reload, and logs, as the command line turns them on."""

import json
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.default_model import ENGINES, MODEL
from tests.e2e.conftest import ROOT, serving
from tests.waiting import HANGS_SECONDS


def keys(*arguments: str) -> str:
    command = [sys.executable, "engineshed.py", "keys", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def ask(url: str, key: str | None) -> tuple[int, str | None]:
    """The status of a short completion, and its request id."""
    headers = {"Content-Type": "application/json", "X-Request-Id": "mine-1"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    body = json.dumps({"prompt": "Once", "max_tokens": 2}).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=HANGS_SECONDS
        ) as response:
            return response.status, response.headers["X-Request-Id"]
    except urllib.error.HTTPError as error:
        return error.code, error.headers["X-Request-Id"]


def test_only_known_keys_are_served_and_a_new_one_from_the_next_sighup_on(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    alice = keys("add", "alice", f"--file={file}")
    with serving(f"--keys={file}", "--slots=2", "--context=256") as server:
        assert ask(server.url, None) == (401, "mine-1")
        assert ask(server.url, "es-wrong")[0] == 401
        assert ask(server.url, alice) == (200, "mine-1")

        bob = keys("add", "bob", f"--file={file}")
        keys("remove", "alice", f"--file={file}")
        assert ask(server.url, bob)[0] == 401
        server.process.send_signal(signal.SIGHUP)
        server.until(lambda: ask(server.url, bob)[0] == 200)
        assert ask(server.url, alice)[0] == 401


def test_https_with_logs_as_json(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    try:
        subprocess.run(
            [*make, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no openssl command to make a certificate with")
    command = [sys.executable, "engineshed.py", "serve", f"--engines={ENGINES}", f"--model={MODEL}", "--port=0"]
    command += ["--slots=1", "--context=256"]
    command += [f"--tls-cert={certificate}", f"--tls-key={key}", "--log-format=json"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = iter(process.stderr)
        ready = next(line for line in map(json.loads, lines) if line["message"].startswith("ready at "))
        url = ready["message"].split()[2]
        assert url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(certificate))
        body = json.dumps({"prompt": "Once", "max_tokens": 2}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=HANGS_SECONDS, context=trusting) as response:
            assert response.status == 200
        told = next(line for line in map(json.loads, lines) if line["message"] == "request")
        assert (told["route"], told["status"], told["model"]) == ("/v1/completions", 200, MODEL)
        assert (told["completion_tokens"], told["prompt_tokens"] > 0) == (2, True)
    finally:
        process.terminate()
        process.wait(HANGS_SECONDS)
        process.stderr.close()
