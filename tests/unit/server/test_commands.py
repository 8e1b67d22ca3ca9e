"""The commands around the server: which bundle is served, what `engines` lists, what `chat` remembers."""

import argparse
import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from yarl import URL

import engineshed
from runtime.bundle import MANIFEST, Bundle, BundleError, Perplexity, Verification
from runtime.messages import Cancel, Generate
from server import serve
from server.chat import ChatError, Conversation
from server.supervision.catalog import Catalog
from server.supervision.process import ServeError
from server.supervision.supervisor import Plan
from tests.unit.server.house import House


def publish(engines: Path, name: str, bundle: Bundle) -> None:
    """Write a bundle whose engine, tokenizer and template are one byte each."""
    folder = engines / name
    (folder / "cpu-int4").mkdir(parents=True)
    (folder / "cpu-int4/model.onnx").write_bytes(b"x")
    for file in bundle.files:
        (folder / file.path).write_bytes(b"0")
    (folder / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(bundle, name=name)))


def planned(*arguments: str) -> Plan:
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    return serve.plan(parser.parse_args(arguments), 8000)


def test_without_a_name_the_first_bundle_is_loaded_and_with_some_those(tmp_path: Path, bundle: Bundle) -> None:
    publish(tmp_path, "beta", bundle)
    publish(tmp_path, "alpha", bundle)
    assert planned(f"--engines={tmp_path}").rules.preload == ["alpha"]
    assert planned(f"--engines={tmp_path}", "--model=beta, alpha").rules.preload == ["beta", "alpha"]
    elsewhere = planned("--engines=elsewhere", f"--model={tmp_path}/beta")
    assert elsewhere.rules.preload == ["beta"]
    assert elsewhere.rules.catalog.find("beta").folder == tmp_path / "beta"


def test_a_bundle_that_is_not_there_is_told_with_those_that_are(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="engineshed export"):
        planned(f"--engines={tmp_path}")
    publish(tmp_path, "alpha", bundle)
    with pytest.raises(BundleError, match=r"'gamma'.*alpha"):
        planned(f"--engines={tmp_path}", "--model=gamma")
    config = tmp_path / "serve.toml"
    config.write_text("[models.gamma]\nslots = 1\n")
    with pytest.raises(ServeError, match=r"'gamma'.*alpha"):
        planned(f"--engines={tmp_path}", f"--config={config}")


def test_bundles_that_come_go_and_are_built_anew_are_noticed(tmp_path: Path, bundle: Bundle) -> None:
    publish(tmp_path, "alpha", bundle)
    catalog = Catalog(tmp_path)
    first = catalog.find("alpha").build
    assert not catalog.refresh()
    publish(tmp_path, "beta", bundle)
    assert catalog.refresh()
    assert list(catalog.entries) == ["alpha", "beta"]
    shutil.rmtree(tmp_path / "alpha")
    publish(tmp_path, "alpha", msgspec.structs.replace(bundle, created=2))
    assert catalog.refresh()
    assert catalog.find("alpha").build != first
    (tmp_path / "beta/cpu-int4/model.onnx").unlink()
    (tmp_path / "beta" / MANIFEST).touch()
    assert catalog.refresh()
    with pytest.raises(BundleError, match="is missing"):
        catalog.find("beta")
    shutil.rmtree(tmp_path / "beta")
    assert catalog.refresh()
    assert list(catalog.entries) == ["alpha"]


@pytest.mark.parametrize("name", ["../alpha", "/etc", "alpha/", ".", "", "alpha\0"])
def test_a_name_never_becomes_a_path(tmp_path: Path, bundle: Bundle, name: str) -> None:
    publish(tmp_path / "engines", "beta", bundle)
    publish(tmp_path, "alpha", bundle)
    with pytest.raises(BundleError, match="there is no bundle"):
        Catalog(tmp_path / "engines").find(name)


def test_engines_lists_variants_with_what_is_known_of_them(
    tmp_path: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    known = msgspec.structs.replace(
        bundle.variants[0],
        verification=Verification("transformers 5.23.0, fp32", 16, 1024, 1020),
        perplexity=Perplexity("text", 1000, 20.2412, 20.2431),
    )
    publish(tmp_path, "alpha", msgspec.structs.replace(bundle, variants=(known,)))
    assert engineshed.main(["engines", f"--engines={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    for part in ("alpha", "cpu-int4", "1020/1024", "20.24 (-0.0%)"):
        assert part in shown


def test_engines_says_which_bundle_is_damaged(tmp_path: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    publish(tmp_path, "alpha", bundle)
    (tmp_path / "alpha/cpu-int4/model.onnx").unlink()
    assert engineshed.main(["engines", f"--engines={tmp_path}"]) == 1
    assert "alpha: " in capsys.readouterr().out


def test_the_commands_are_listed_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as asked:
        engineshed.main([])
    assert asked.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in engineshed.COMMANDS)
    with pytest.raises(SystemExit) as wrong:
        engineshed.main(["sevre"])
    assert wrong.value.code == 2
    assert "serve" in capsys.readouterr().err


def test_serving_imports_nothing_of_export() -> None:
    script = (
        "import sys, server.serve, server.front, server.chat, server.engines, engineshed;"
        "print([name for name in ('torch', 'transformers', 'onnx', 'onnxruntime', 'export') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def conversation(house: House, system: str | None = None) -> Conversation:
    url = house.http._base_url
    assert url is not None
    return Conversation(URL(url), "tiny", system, {"max_tokens": 9})


async def say(talk: Conversation, text: str) -> str:
    return "".join([piece async for piece in talk.say(text)])


def prompt(house: House, request: Generate) -> str:
    return house.text.stream().push(request.prompt)


async def test_a_conversation_is_remembered_until_it_is_cleared(house: House) -> None:
    talk = conversation(house, system="s")
    for said, answer, seen in [("hi", "yo", "s:s\nu:hi\na:"), ("so", "ok", "s:s\nu:hi\na:yo\nu:so\na:")]:
        asking = asyncio.create_task(say(talk, said))
        request = await house.worker.next(Generate)
        assert prompt(house, request) == seen
        assert request.max_tokens == 9
        await house.worker.say(request, answer, "stop")
        assert await asking == answer
        assert talk.tokens == 2
    talk.clear()
    asking = asyncio.create_task(say(talk, "hi"))
    request = await house.worker.next(Generate)
    assert prompt(house, request) == "s:s\nu:hi\na:"
    await house.worker.say(request, "!", "stop")
    await asking


async def test_an_answer_that_is_stopped_stays_as_far_as_it_came(house: House) -> None:
    talk, shown = conversation(house), asyncio.Event()

    async def show() -> None:
        async for _ in talk.say("hi"):
            shown.set()

    asking = asyncio.create_task(show())
    request = await house.worker.next(Generate)
    await house.worker.say(request, "one")
    await shown.wait()
    asking.cancel()
    assert (await house.worker.next(Cancel)).id == request.id
    asking = asyncio.create_task(show())
    request = await house.worker.next(Generate)
    assert prompt(house, request) == "u:hi\na:one\nu:hi\na:"
    await house.worker.say(request, "!", "stop")
    await asking


async def test_what_the_server_refuses_is_told_and_forgotten(house: House) -> None:
    talk = conversation(house)
    with pytest.raises(ChatError, match="tokens of the context"):
        await say(talk, "x" * 59)
    asking = asyncio.create_task(say(talk, "hi"))
    request = await house.worker.next(Generate)
    assert prompt(house, request) == "u:hi\na:"
    await house.worker.fail(request, "the step failed")
    with pytest.raises(ChatError, match="the step failed"):
        await asking


async def test_an_answer_that_breaks_is_told_with_its_reason(house: House) -> None:
    talk, shown = conversation(house), asyncio.Event()

    async def show() -> None:
        async for _ in talk.say("hi"):
            shown.set()

    asking = asyncio.create_task(show())
    request = await house.worker.next(Generate)
    await house.worker.say(request, "one")
    await shown.wait()
    await house.worker.fail(request, "the step failed")
    with pytest.raises(ChatError, match="the step failed"):
        await asking


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--port=99999"], "99999 is more than 65535"),
        (["serve", "--port=-1"], "-1 is less than 0"),
        (["serve", "--slots=0"], "0 is less than 1"),
        (["serve", "--queue=many"], "'many' is no whole number"),
        (["serve", "--device=cpu,gpu"], "'gpu' is no device"),
        (["serve", "--memory=much"], "'much' is no amount of memory"),
        (["serve", "--watchdog-seconds=0"], "0 is no length of time"),
        (["serve", "--gpu-memory=0"], "0 is not above 0 and at most 1"),
        (["serve", "--gpu-memory=90%"], "'90%' is no number"),
        (["chat", "--url=127.0.0.1:8000"], "'127.0.0.1:8000' is no address"),
        (["bench", "--tokens=1"], "'1' is no whole number of at least 2"),
        (["bench", "--repeats=0"], "'0' is no whole number of at least 1"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        engineshed.main(arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_bench_says_what_an_address_looks_like(capsys: pytest.CaptureFixture[str]) -> None:
    assert engineshed.main(["bench", "--url=127.0.0.1:8000"]) == 1
    assert "give one as http://" in capsys.readouterr().err
