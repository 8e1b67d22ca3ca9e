"""What runs on a bare GPU machine (see docs/gpu.md) imports none of the packages that such a machine lacks."""

import subprocess
import sys

import pytest

ABSENT = (
    "aiohttp",
    "gguf",
    "hypothesis",
    "msgspec",
    "openai",
    "optimum",
    "prometheus_client",
    "psutil",
    "pynvml",
    "pytest_asyncio",
    "pytest_benchmark",
    "pytest_timeout",
    "uvloop",
    "zmq",
)
BLOCKED = f"""
import importlib, sys
for name in {ABSENT!r}:
    sys.modules[name] = None  # whose import then fails
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
LIGHT = ("bench.gpu.measure", "bench.gpu.report", "bench.gpu.__main__")
RUNTIME = ("accelerator", "cuda", "engine", "gpu", "gpu_memory", "ort_cuda", "ort_providers", "trt", "trt_contexts", "trt_plan")
EXPORT = ("attention", "cache", "cuda", "decoder", "fuse", "graph", "sampler", "step", "survey", "verify")


def imported(*names: str, then: str = "") -> subprocess.CompletedProcess[str]:
    """The end of a process that imports `names` without what a bare machine lacks."""
    command = [sys.executable, "-c", BLOCKED + then, *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("package", ["runtime", "export", "bench.gpu"])
def test_what_a_gpu_needs_is_imported_without_what_is_absent(package: str) -> None:
    modules = {
        "runtime": RUNTIME,
        "export": EXPORT,
        "bench.gpu": ("clock", "compiled", "machine", "measure", "models", "report", "run"),
    }
    done = imported(*(f"{package}.{module}" for module in modules[package]))
    assert done.returncode == 0, done.stderr


def test_the_gpu_tests_are_imported_without_what_is_absent() -> None:
    names = ("conftest", "test_engine", "test_memory", "test_sampling", "test_tensorrt_rtx")
    done = imported(*(f"tests.gpu.{name}" for name in names))
    assert done.returncode == 0, done.stderr


def test_the_check_notices_what_is_absent() -> None:
    done = imported("runtime.bundle")
    assert done.returncode != 0
    assert "msgspec" in done.stderr


def test_the_bench_explains_itself_without_torch() -> None:
    done = imported(*LIGHT, then="assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr
