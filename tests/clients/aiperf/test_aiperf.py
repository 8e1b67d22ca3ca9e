"""A short load by aiperf, which counts tokens with the tokenizer of the bundle: it needs no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENGINES = Path(__file__).parents[3] / "engines"
REQUESTS = 12
TOKENS = 16


@pytest.mark.timeout(300)
def test_every_request_of_a_load_succeeds(tmp_path: Path, url: str, key: str, model: str) -> None:
    options = {
        "model": model,
        "url": url,
        "api-key": key,
        "endpoint-type": "chat",
        "tokenizer": ENGINES / model,
        "concurrency": 4,
        "request-count": REQUESTS,
        "synthetic-input-tokens-mean": 32,
        "output-tokens-mean": TOKENS,
        "random-seed": 1,
        "ui": "none",
        "artifact-dir": tmp_path,
    }
    command = [sys.executable, "-m", "aiperf", "profile", "--streaming", "--extra-inputs", "ignore_eos:true"]
    done = subprocess.run(
        [*command, *(f"--{name}={value}" for name, value in options.items())],
        env={**os.environ, "HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["is_complete"]
    assert report["request_count"]["avg"] == REQUESTS
    assert report["error_summary"] == []
    assert "error_request_count" not in report
    assert report["usage_completion_tokens"]["min"] == report["usage_completion_tokens"]["max"] == TOKENS
    assert abs(report["output_sequence_length"]["avg"] - TOKENS) < 1, "the text has as many tokens, give or take a split"
    assert report["inter_token_latency"]["avg"] > 0, "the tokens came one after another"
