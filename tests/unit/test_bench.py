"""The bench in process: what is said to a driver, the turns, and what comes of them, with a tiny model's real engines."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

import engineshed
from bench import cli, engine, machine
from bench.engine import DriverError, Load, Process
from bench.measure import Machine, Report, Result, percentile
from bench.peers import catalog
from bench.peers.catalog import Peer
from bench.peers.driver import losses, perplexity
from runtime import bundle
from tests import tiny

LOAD = Load(streams=(1, 2), prompt_tokens=20, tokens=6, repeats=2, threads=1)
HERE = Machine("a processor", "a system", "3.11", cores=1, read_bandwidth=1e9, sgemm=1e10, date="2026-01-01")


@pytest.fixture
def process(tiny_bundle: Path) -> Iterator[Process]:
    started = Process(catalog.own(tiny_bundle, "cpu-fp32"), LOAD)
    yield started
    started.close()


def test_a_driver_gives_each_stream_its_tokens_and_their_times(process: Process) -> None:
    assert process.hear()["vocab"] == tiny.VOCAB
    prompts = LOAD.prompts(2, 0, tiny.VOCAB)
    together = process.ask("run", prompts=prompts, tokens=6)
    assert [len(tokens) for tokens in together["tokens"]] == [6, 6]
    for times in together["times"]:
        assert len(times) == 6
        assert times == sorted(times)
        assert times[0] > 0
    alone = [process.ask("run", prompts=[prompt], tokens=6)["tokens"][0] for prompt in prompts]
    assert together["tokens"] == alone


def test_a_driver_measures_the_perplexity_that_the_export_recorded(process: Process, tiny_bundle: Path) -> None:
    process.hear()
    manifest = bundle.read(tiny_bundle)
    recorded = manifest.variant("cpu-fp32").perplexity
    assert recorded is not None
    tokens = [token for window in cli.windows(tiny_bundle, manifest) for token in window][: recorded.tokens]
    cut = [tokens[start : start + tiny.POSITIONS] for start in range(0, len(tokens), tiny.POSITIONS)]
    assert process.ask("perplexity", windows=cut)["perplexity"] == pytest.approx(recorded.value, rel=1e-4)


def test_a_driver_says_what_was_wrong_and_goes_on(process: Process) -> None:
    process.hear()
    with pytest.raises(DriverError, match=r"engineshed cpu-fp32 failed: .*'dance'"):
        process.ask("dance")
    with pytest.raises(DriverError, match="outside the vocabulary"):
        process.ask("run", prompts=[[tiny.VOCAB]], tokens=2)
    assert process.ask("rss")["rss"] > 1 << 20


def test_a_process_that_ends_is_an_error_with_its_last_words(process: Process) -> None:
    process.hear()
    process._process.kill()
    with pytest.raises(DriverError, match="ended too early"):
        process.ask("rss")


def test_an_engine_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    started = Process(catalog.own(tmp_path, "cpu-fp32"), LOAD)
    try:
        with pytest.raises(DriverError, match="is no engine bundle"):
            started.hear()
    finally:
        started.close()


def test_every_engine_is_measured_under_every_load_and_compared_repeat_by_repeat(tiny_bundle: Path) -> None:
    own, other = (catalog.own(tiny_bundle, name) for name in ("cpu-int4", "cpu-fp32"))
    told: list[str] = []
    results, ratios, others = engine.measure([own], [other], LOAD, tiny.VOCAB, [list(range(100, 140))], told.append)
    assert told == []
    assert 0 <= others <= 1
    assert [(result.what, result.streams) for result in results] == [
        ("engineshed cpu-int4", 1),
        ("engineshed cpu-fp32", 1),
        ("engineshed cpu-int4", 2),
        ("engineshed cpu-fp32", 2),
    ]
    for result in results:
        assert len(result.first_tokens) == LOAD.repeats * result.streams
        assert len(result.inter_tokens) == LOAD.repeats * result.streams * (LOAD.tokens - 1)
        assert len(result.rates) == LOAD.repeats
        assert result.rss is not None
        assert result.rss > 1 << 20
        assert result.perplexity is not None
        assert result.perplexity > 1
        assert result.start_seconds is not None
        assert result.start_seconds > max(result.first_tokens)
    assert {(ratio.what, ratio.against) for ratio in ratios} == {(own.what, other.what)}
    assert [len(ratio.values) for ratio in ratios] == [LOAD.repeats] * 6


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ('print(\'{"error": "no memory"}\')', "left out: a peer failed: no memory"),
        ("raise SystemExit('it is broken')", "it is broken"),
        ('print(\'{"note": "", "vocab": 7, "weights": 1}\')', "it is another model"),
    ],
)
def test_a_peer_that_fails_is_left_out_with_a_line(tiny_bundle: Path, tmp_path: Path, code: str, sentence: str) -> None:
    broken = tmp_path / "python"
    broken.write_text(f"#!{sys.executable}\n{code}\n")
    broken.chmod(0o755)
    peer = Peer("a peer", broken, "bench.peers.none", tmp_path, "int4", 4)
    told: list[str] = []
    own = catalog.own(tiny_bundle, "cpu-int4")
    results, ratios, _ = engine.measure([own], [peer], Load((1,), 8, 2, 1, 1), tiny.VOCAB, [], told.append)
    assert [result.what for result in results] == [own.what]
    assert ratios == []
    assert len(told) == 1
    assert sentence in told[0]


def test_prompts_are_the_same_for_all_and_new_in_every_repeat() -> None:
    assert LOAD.prompts(2, 0, 512) == LOAD.prompts(2, 0, 512)
    seen = [tuple(prompt) for repeat in range(3) for streams in (1, 2) for prompt in LOAD.prompts(streams, repeat, 512)]
    assert len(set(seen)) == len(seen)


def test_peers_that_are_not_installed_are_named_with_the_command_that_installs_them(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = bundle.read(tiny_bundle)
    assert catalog.chosen(["none"], manifest, tmp_path) == ([], [])
    found, missing = catalog.chosen(["all"], manifest, tmp_path)
    assert found == []
    assert len(missing) == 1
    assert missing[0].endswith("run: make bench-peers")

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "source.json").write_text(json.dumps({"sha256": manifest.source.sha256}))
    names = ["llama.cpp Q4_1", "llama.cpp Q4_0", "llama.cpp Q8_0"]
    _, missing = catalog.chosen(["llama"], manifest, tmp_path)
    assert [line.partition(" is left out")[0] for line in missing] == names
    for peer in catalog.catalog(tmp_path)["llama"]:
        peer.python.parent.mkdir(parents=True, exist_ok=True)
        peer.python.write_text("")
        peer.python.chmod(0o755)
        peer.model.parent.mkdir(exist_ok=True)
        peer.model.write_text("")
    found, missing = catalog.chosen(["llama"], manifest, tmp_path)
    assert [peer.what for peer in found] == names
    assert missing == []

    with pytest.raises(ValueError, match="there is no peer 'vllm'; there are llama"):
        catalog.chosen(["vllm"], manifest, tmp_path)


def test_every_peer_has_a_driver_and_pinned_requirements() -> None:
    for home, peers in catalog.catalog().items():
        pinned = [line for line in (Path(catalog.__file__).parent / f"{home}.txt").read_text().splitlines() if line[0] != "#"]
        assert pinned
        assert all("==" in line for line in pinned)
        assert {peer.module for peer in peers} == {f"bench.peers.{home}"}
        assert Path(catalog.__file__).with_name(f"{home}.py").exists()


def test_products_are_counted_without_the_lm_head(tiny_bundle: Path) -> None:
    config = tiny.configuration()
    hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    assert hidden is not None
    attention = hidden * (4 + 2 + 2) * 16 + 4 * 16 * hidden
    manifest = bundle.read(tiny_bundle)
    assert engine.parameters(tiny_bundle, manifest) == layers * (attention + 3 * hidden * wide)
    quantized = msgspec.structs.replace(manifest, variants=(manifest.by_name["cpu-int4"],))
    assert engine.parameters(tiny_bundle, quantized) == layers * (attention + 3 * hidden * wide)


def test_shares_are_of_the_limits() -> None:
    result = Result(
        "x", 1, first_tokens=[0.5, 0.4, 0.6], inter_tokens=[0.2] * 9, prompt_tokens=100, weights=10**8, parameters=10**7
    )
    assert result.bandwidth_share(HERE) == pytest.approx(0.5)
    assert result.sgemm_share(HERE) == pytest.approx(2 * 1e7 * 100 / 1e10 / 0.5)
    several = msgspec.structs.replace(result, streams=2)
    assert several.bandwidth_share(HERE) is None
    assert several.sgemm_share(HERE) is None
    assert Result("x", 1, weights=1, parameters=1).bandwidth_share(HERE) is None


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(i) for i in range(100)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [0, 50, 99, 99]
    assert percentile([], 0.5) is None


def test_losses_are_negative_log_probabilities() -> None:
    logits = np.log(np.array([[1, 2, 1], [8, 1, 1]], np.float32)) + 50
    assert losses(logits, [1, 0]) == pytest.approx([np.log(2), np.log(10 / 8)], abs=1e-5)
    assert perplexity([np.log(2), np.log(8)]) == pytest.approx(4)


def test_the_machine_is_measured_and_named() -> None:
    here = machine.measure()
    assert here.read_bandwidth > 0
    assert here.sgemm > 0
    assert here.cores >= 1
    assert here.processor


def test_work_of_our_own_processes_is_not_taken_for_that_of_others() -> None:
    with_ours, without = machine.Others([]), machine.Others([os.getpid()])
    end = time.process_time() + 0.5
    while time.process_time() < end:
        sum(range(10_000))
    assert 0 <= without.share() < with_ours.share() <= 1


def test_the_command_measures_shows_and_writes(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    arguments = ["bench", f"--engines={tiny_bundle.parent}", f"--model={tiny_bundle.name}", "--variant", "cpu-int4"]
    arguments += ["--streams", "1", "--prompt-tokens=8", "--tokens=3", "--repeats=1", f"--json={figures}", f"--page={page}"]
    assert engineshed.main(arguments) == 0
    said = capsys.readouterr().out
    assert "engineshed cpu-int4" in said
    assert "make bench-peers" in said  # the peers, if any, were installed for another model
    report = msgspec.json.decode(figures.read_bytes(), type=Report)
    (result,) = report.results
    assert (result.streams, result.prompt_tokens, result.tokens) == (1, 8, 3)
    assert result.parameters
    assert "engineshed cpu-int4" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model=absent"], "is no engine bundle"),
        (["--variant", "cpu-int2"], "has no variant 'cpu-int2'"),
        (["--peers", "vllm"], "there is no peer 'vllm'"),
        (["--prompt-tokens=600"], "600 + 64 tokens are more than the model's 512"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_sentence(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    given = ["bench", f"--engines={tiny_bundle.parent}", f"--model={tiny_bundle.name}", *arguments]
    assert engineshed.main(given) == 1
    assert sentence in capsys.readouterr().err
