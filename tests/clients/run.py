"""Run the tests of clients, each group in its own virtual environment, all against one server: `make test-clients`.

A group is a folder here: its tests, and in requirements.txt the exact versions that they run with. Its example in
docs/clients.md is tested as well. The Makefile installs them under .venv-clients, apart from engineshed's own dependencies,
with which they need not agree.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.default_model import MODEL
from tests.e2e.conftest import ROOT, serving

CLIENTS = Path(__file__).parent
ENVIRONMENTS = ROOT / ".venv-clients"


def main(groups: list[str]) -> int:
    """Run the tests of `groups`; gives the exit code, 0 where all passed."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.toml"
        command = [sys.executable, "engineshed.py", "keys", "add", "client", f"--file={keys}"]
        key = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        with serving(f"--keys={keys}", "--context=2048", "--log-level=warning") as server:
            environment = {
                **os.environ,
                "ENGINESHED_URL": server.url,
                "ENGINESHED_API_KEY": key.strip(),
                "ENGINESHED_MODEL": MODEL,
            }
            failed = [group for group in groups if not passes(group, environment)]
    if failed:
        print(f"Tests failed of these clients: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def passes(group: str, environment: dict[str, str]) -> bool:
    """Run the tests of `group` and say whether all passed."""
    begin = time.monotonic()
    python = ENVIRONMENTS / group / "bin" / "python"
    ini = CLIENTS / "pytest.ini"
    options = [f"--config-file={ini}", f"--rootdir={ROOT}", f"--confcutdir={CLIENTS}"]
    print(f"{group}:", flush=True)
    tests = [str(CLIENTS / group), str(CLIENTS / "test_documented.py")]
    command = [str(python), "-m", "pytest", *tests, *options]
    code = subprocess.run(command, cwd=ROOT, env={**environment, "ENGINESHED_CLIENT": group}).returncode
    print(f"{group}: exit code {code} after {time.monotonic() - begin:.0f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
