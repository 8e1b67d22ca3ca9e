"""`engineshed bench serve` against real servers."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench import report
from bench.measure import Report, Result
from tests.default_model import ENGINES, MODEL, STANDS_IN
from tests.e2e.conftest import ROOT, Server, serving
from tests.waiting import HANGS_SECONDS

COMMAND = [sys.executable, "engineshed.py", "bench", "serve"]
SERVE = shlex.join(
    [
        *(sys.executable, "engineshed.py", "serve", f"--engines={ENGINES}", f"--model={MODEL}"),
        *("--context=128", "--log-level=warning"),
    ]
)
SHORT = ("--prompt-tokens=uniform:8-16", "--tokens=6")


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *options], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


def measured(folder: Path, *options: str) -> Report:
    """The report of a run that went well."""
    done = bench(*options, f"--json={folder / 'report.json'}", f"--page={folder / 'page.html'}")
    assert done.returncode == 0, done.stderr
    assert "</html>" in (folder / "page.html").read_text()
    return report.read_json(folder / "report.json")


def only(whole: Report) -> Result:
    (result,) = whole.results
    return result


def test_a_running_server_is_measured_in_closed_and_open_loops(server: Server, tmp_path: Path) -> None:
    options = ("--streams", "1", "2", "--rate", "4", "--requests=3", "--repeats=2")
    whole = measured(tmp_path, f"--url=it={server.url}", *options, *SHORT)
    assert [(result.what, result.streams, result.arrivals) for result in whole.results] == [
        ("it", 1, None),
        ("it", 2, None),
        ("it", 0, 4.0),
    ]
    assert [len(result.first_tokens) for result in whole.results] == [6, 12, 6]
    for result in whole.results:
        assert result.errors == 0
        assert len(result.rates) == 2
        assert 8 <= result.prompt_tokens <= 16
        assert 1 <= result.tokens <= 6
        assert result.inter_tokens
        assert all(first <= last for first, last in zip(result.first_tokens, result.latencies, strict=True))
    assert whole.machine.read_bandwidth > 1e8
    assert "bench serve" in whole.command
    assert whole.command.endswith("# prompts of 8 to 16 tokens, answers of 6")


def test_prompts_share_what_they_are_told_to_share_and_nothing_else(server: Server, tmp_path: Path) -> None:
    options = (f"--url={server.url}", "--streams=1", "--requests=4", "--repeats=1", *SHORT)
    alone = only(measured(tmp_path, *options, "--seed=1"))
    again = only(measured(tmp_path, *options, "--seed=1", "--prompt-tokens=128"))
    once_more = only(measured(tmp_path, *options, "--seed=1", "--prompt-tokens=128"))
    together = only(measured(tmp_path, *options, "--shared-prefix=256", "--seed=2"))
    assert alone.cached_share is not None
    assert alone.cached_share < 0.1, "no more than a first token by chance"
    assert "--seed" not in again.note
    assert "--seed" in once_more.note, "who asks a running server the same twice is told"
    assert together.cached_share is not None
    assert together.cached_share > 0.6, "three of four prompts begin with 256 tokens that were computed before"


def test_prompts_as_text_are_about_as_long_as_asked(server: Server, tmp_path: Path) -> None:
    options = (f"--url={server.url}/v1", "--text", "--streams=1", "--requests=2", "--repeats=1", "--prompt-tokens=40")
    assert 36 <= only(measured(tmp_path, *options, "--tokens=4")).prompt_tokens <= 60


def test_refused_requests_are_counted_and_the_rest_is_measured(tmp_path: Path) -> None:
    with serving("--slots=1", "--queue=0", "--context=128") as small:
        options = ("--streams=4", "--requests=3", "--repeats=1", "--prompt-tokens=16", "--tokens=100")
        result = only(measured(tmp_path, f"--url={small.url}", *options))
    assert result.errors > 0
    assert len(result.first_tokens) == 12 - result.errors > 0
    assert "x 429" in result.note


def test_started_servers_take_turns_and_have_ended_afterwards(tmp_path: Path) -> None:
    starts = [f"--start={name}={SERVE} --slots={slots} --port {{port}}" for name, slots in (("two", 2), ("four", 4))]
    weights = f"--weights=two={ENGINES / MODEL / ('cpu-fp32' if STANDS_IN else 'cpu-int4')}"
    options = ("--streams", "1", "2", "--requests=2", "--repeats=3", "--parameters=134515008", weights)
    whole = measured(tmp_path, *starts, *options, *SHORT)
    assert [(result.what, result.streams) for result in whole.results] == [("two", 1), ("four", 1), ("two", 2), ("four", 2)]
    for result in whole.results:
        assert result.start_seconds is not None
        assert result.start_seconds > 0.1
        assert result.rss is not None
        assert result.rss > (30_000_000 if STANDS_IN else 100_000_000), "the weights alone are more"
    assert whole.results[0].bandwidth_share(whole.machine) is not None
    assert whole.results[0].sgemm_share(whole.machine) is not None
    assert whole.results[1].bandwidth_share(whole.machine) is None
    assert {(ratio.what, ratio.against) for ratio in whole.ratios} == {("two", "four")}
    for ratio in whole.ratios:  # tokens that a quick server sends at once have no time between them
        assert len(ratio.values) == 3 or (ratio.figure.startswith("ITL") and len(ratio.values) < 3)
    assert not [process for process in psutil.Process().children(recursive=True) if "--context=128" in process.cmdline()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_started_servers_have_ended_when_the_bench_is_stopped(number: signal.Signals) -> None:
    start = f"--start=it={SERVE} --port {{port}}"
    endless = ("--streams=1", "--requests=100000", "--prompt-tokens=8", "--tokens=100")
    with subprocess.Popen([*COMMAND, start, *endless], cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + HANGS_SECONDS
        family: list[psutil.Process] = []
        while len(family) < 2:
            assert time.monotonic() < deadline, "the server and its worker have not come up"
            time.sleep(0.05)
            family = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(number)
        assert run.wait(HANGS_SECONDS) == 130
        assert run.stderr is not None
        assert "stopped before its end" in run.stderr.read()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_bench_says_so_also_where_its_server_has_ended_first(number: signal.Signals) -> None:
    """As when whoever stops it sends the signal to all of its processes: what became of the server is not what went wrong."""
    orphan = (
        "import os, sys, time\nbench, server = map(int, sys.argv[1:])\n"
        "while os.path.exists(f'/proc/{server}'): time.sleep(0.01)  # until the bench has seen its end\n"
        f"os.kill(bench, {int(number)})\ntime.sleep(600)"
    )
    server = (
        "import os, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {orphan!r}, str(os.getppid()), str(os.getpid())])\nos._exit(3)  # {{port}}"
    )
    done = bench(f"--start=it={shlex.join([sys.executable, '-c', server])}")
    assert (done.returncode, "stopped before its end" in done.stderr) == (130, True), done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "there is nothing to measure"),
        (["--url", "127.0.0.1:8000"], "give one as http://127.0.0.1:8000"),
        (["--url", "http://127.0.0.1:1"], "no server answers"),
        (["--start", "it=echo no such model {port}"], "the last it said:\nno such model"),
        (["--start", "it=sleep 600"], "has no {port}"),
        (["--url", "a=http://127.0.0.1:1", "--url", "a=http://127.0.0.1:2"], "two servers are called a"),
        (["--url", "a=http://127.0.0.1:1", "--weights", "b=1"], "NAME is one of a"),
        (["--url", "a=http://127.0.0.1:1", "--rate", "1000", "--duration", "1e6"], "ask for 1 to"),
    ],
)
def test_what_cannot_be_measured_is_told(options: list[str], words: str) -> None:
    done = bench(*options)
    assert done.returncode == 1
    assert words in done.stderr


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--prompt-tokens=normal:3", "is no length"),
        ("--streams=0", "at least 1"),
        ("--rate=nan", "at least 0.001"),
        ("--page=/no/where", "no folder"),
    ],
)
def test_an_option_that_is_wrong_is_told(option: str, words: str) -> None:
    done = bench("--url=http://127.0.0.1:1", option)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_model_that_the_server_does_not_have_is_told(server: Server) -> None:
    done = bench(f"--url={server.url}", "--model=gpt-9")
    assert done.returncode == 1
    assert "The model 'gpt-9' does not exist" in done.stderr
