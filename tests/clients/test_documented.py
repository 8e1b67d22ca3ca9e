"""What docs/clients.md shows of the client whose environment this runs in."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_the_documented_example_works(tmp_path: Path, url: str, key: str) -> None:
    name = os.environ["ENGINESHED_CLIENT"]
    document = (ROOT / "docs" / "clients.md").read_text()
    section = document.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    found = re.search(r"```(python|sh)\n(.*?)```", section, re.DOTALL)
    assert found is not None, f"docs/clients.md shows nothing of {name}"
    program = [sys.executable, "-c"] if found[1] == "python" else ["bash", "-euc"]
    (tmp_path / "engines").symlink_to(ROOT / "engines")
    done = subprocess.run(
        [*program, found[2].replace("http://127.0.0.1:8000", url).replace("KEY", key)],
        cwd=tmp_path,
        env={
            **os.environ,
            "HOME": str(tmp_path),
            "LLM_USER_PATH": str(tmp_path / "llm"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
