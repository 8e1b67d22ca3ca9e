"""`engineshed top` beside a server that works."""

import asyncio
import sys
from pathlib import Path

from server import keys
from tests.service.conftest import ROOT, serve


async def command(name: str, *options: str, key: str = "", said: bytes = b"") -> tuple[int, str]:
    """A command's exit code, and what it wrote after it was told what was `said`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "engineshed.py", name, *options),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"COLUMNS": "200", "ENGINESHED_API_KEY": key},
    )
    written, _ = await process.communicate(said)
    return process.returncode or 0, written.decode()


async def top(*options: str, key: str = "") -> tuple[int, str]:
    return await command("top", "--once", "--every=0.5", *options, key=key)


async def test_it_shows_engines_models_memory_and_processes(engines: Path) -> None:
    async with serve(engines, "--model=alpha") as running:
        going = asyncio.gather(*(running.answer("alpha", [number + 3, 5, 6], 240) for number in range(40)))
        code, said = await top(f"--socket={engines.parent / 'admin.sock'}")
        await going
        assert code == 0, said
        (engine,) = (line.split() for line in said.splitlines() if line.startswith("alpha@cpu") and "ready" in line)
        assert int(engine[2].split("/")[0]) <= 4
        assert engine[2].endswith("/4")
        for part in ("tok/s", "beta", "cold", "http-0", "supervisor", "MiB"):
            assert part in said


async def test_without_an_admins_key_it_says_what_is_missing(engines: Path) -> None:
    async with serve(engines, "--model=alpha") as running:
        code, said = await top(f"--url={running.url}")
        assert code == 1
        assert "admin" in said
    code, said = await top("--url=http://127.0.0.1:9")
    assert code == 1
    assert "no server answers at http://127.0.0.1:9" in said


async def test_it_and_chat_send_the_key_in_the_environment(engines: Path) -> None:
    entry, key = keys.new("root", admin=True)
    path = engines.parent / "keys.toml"
    keys.update(path, lambda others: [*others, entry])
    async with serve(engines, "--model=alpha", f"--keys={path}", ready=False) as running:
        assert (await top(f"--url={running.url}"))[0] == 1
        code, said = await top(f"--url={running.url}", key=key)
        assert (code, "alpha@cpu" in said) == (0, True), said
        code, said = await command("chat", f"--url={running.url}", "--max-tokens=3", said=b"hello\n")
        assert (code, "ENGINESHED_API_KEY" in said) == (1, True), said
        code, said = await command("chat", f"--url={running.url}", "--max-tokens=3", said=b"hello\n", key=key)
        assert (code, "alpha at" in said) == (0, True), said
