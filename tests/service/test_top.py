"""`engineshed top` beside a server that works."""

import asyncio
import sys
from pathlib import Path

from tests.service.conftest import ROOT, serve


async def top(*options: str) -> tuple[int, str]:
    """The command's exit code, and what it said."""
    command = [sys.executable, "engineshed.py", "top", "--once", "--every=0.5", *options]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env={"COLUMNS": "200"}
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


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
