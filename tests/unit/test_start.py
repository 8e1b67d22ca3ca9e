"""What a start does and leaves undone: imports, files read, memory touched, and the ways in which it is refused or stopped."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from runtime import bundle, ort
from runtime.bundle import BundleError
from runtime.engine import Batch, Draw
from tests.waiting import HANGS_SECONDS

ROOT = Path(__file__).parents[2]
EXPORTERS = {"export", "onnx", "onnxscript", "optimum", "torch", "transformers"}
HTTP = {"aiohttp", "jinja2", "prometheus_client", "tokenizers", "uvloop", "server.front"}
ENGINE = {"numpy", "onnxruntime", "psutil", "runtime.ort"}

COUNTING_FILES = """
import collections, pathlib, runpy, sys
opened = collections.Counter()
def count(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        opened[pathlib.Path(arguments[0]).name] += 1
sys.addaudithook(count)
try:
    runpy.run_module("runtime.worker", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert end.code == 0, end.code
print(*(opened[name] for name in ("bundle.json", "model.onnx", "weights.bin", "tokenizer.json")))
"""


def imported(module: str) -> set[str]:
    """The modules that a fresh interpreter has loaded once it has imported `module`."""
    script = f"import sys, {module}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copied"))


def flip(path: Path, at: int) -> None:
    """Damage one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def worker(folder: Path, *options: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """A worker whose parent is gone already: it loads its engine, or cannot, and ends."""
    program = ["-m", "runtime.worker"] if code is None else ["-c", code]
    flags = [
        f"--bundle={folder}",
        "--variant=cpu-fp32",
        "--slots=2",
        "--context=64",
        f"--socket=ipc://{folder}/socket",
        *options,
    ]
    return subprocess.run(
        [sys.executable, *program, *flags], cwd=ROOT, input="", capture_output=True, text=True, timeout=HANGS_SECONDS
    )


def serve(folder: Path, temporary: Path, *options: str) -> subprocess.Popen[str]:
    """`engineshed serve` with its temporary files in `temporary`."""
    command = [sys.executable, "engineshed.py", "serve", f"--model={folder}", *options]
    environment = os.environ | {"TMPDIR": str(temporary)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_serve_starts_its_engine_before_it_imports_what_http_needs() -> None:
    assert not imported("server.serve") & (HTTP | (ENGINE - {"psutil"}) | EXPORTERS)


def test_an_engines_process_imports_nothing_of_http_or_export() -> None:
    loaded = imported("runtime.worker")
    assert loaded >= ENGINE
    assert not loaded & (HTTP | EXPORTERS)


def test_the_manifest_is_read_once_and_every_file_hashed_once(copied: Path) -> None:
    ended = worker(copied, code=COUNTING_FILES)
    assert ended.stdout.split() == ["1", "1", "1", "1"], ended.stderr


@pytest.mark.parametrize("path", ["tokenizer.json", "cpu-fp32/weights.bin"])
def test_an_engine_with_a_damaged_file_never_serves(copied: Path, path: str) -> None:
    flip(copied / path, -1)
    ended = worker(copied)
    assert ended.returncode == 2
    assert f"{copied / path} is not the file that was exported" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_damaged_graph_is_not_given_to_onnx_runtime(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(copied / "cpu-fp32" / "model.onnx", 0)
    monkeypatch.delattr(ort, "OrtEngine")
    with pytest.raises(BundleError, match=r"model\.onnx is not the file that was exported"):
        ort.load(copied, "cpu-fp32", slots=1, context=8)


def test_where_weights_are_damaged_and_cannot_be_loaded_either_the_damage_is_told(copied: Path) -> None:
    flip(copied / "cpu-fp32" / "weights.bin", 0)
    with pytest.raises(BundleError, match=r"weights\.bin is not the file that was exported"):
        ort.load(copied, "cpu-fp32", slots=10_000_000, context=512)


def test_slots_take_memory_only_for_the_tokens_that_stand_in_them(tiny_bundle: Path) -> None:
    width, context = bundle.read(tiny_bundle).variant("cpu-fp32").kv_bytes_per_token, 512
    slots = (512 << 20) // (width * context)
    before = psutil.Process().memory_info().rss
    engine = ort.load(tiny_bundle, "cpu-fp32", slots=slots, context=context, threads=1)
    for slot in range(0, slots, slots // 8):
        prompt = np.full((1, 64), 5, np.int64)
        engine.step(Batch(slot, prompt, np.array([64], np.int32), np.array([63], np.int64), Draw.greedy(1)))
        engine.step(Batch(slot, prompt[:, :1], np.array([65], np.int32), np.array([0], np.int64), Draw.greedy(1)))
    engine.copy(0, slots - 1, 65)
    engine.exchange((0, 65), (slots - 2, 0))
    grown = psutil.Process().memory_info().rss - before
    engine.close()
    assert grown < 128 << 20, f"{slots} slots of 512 MiB in all take {grown >> 20} MiB"


def test_a_server_that_is_stopped_while_it_starts_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    server = serve(tiny_bundle, tmp_path, "--port=0")
    assert server.stderr is not None
    assert "loading" in server.stderr.readline()
    server.send_signal(signal.SIGTERM)
    told = server.stderr.read()  # to its end, which the engine's process holds open, too
    assert server.wait(HANGS_SECONDS) == 0
    assert "Traceback" not in told
    assert not list(tmp_path.glob("engineshed-*"))


def test_a_server_without_its_port_ends_with_a_sentence_and_its_engine_with_it(tiny_bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = serve(tiny_bundle, tmp_path, f"--port={taken.getsockname()[1]}")
        _, told = server.communicate(timeout=HANGS_SECONDS)
    assert server.returncode == 1
    assert "choose with --host and --port" in told
    assert not list(tmp_path.glob("engineshed-*"))
