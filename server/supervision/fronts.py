"""The HTTP processes, as the supervisor keeps them: started, replaced when they die, told to stop."""

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from server.supervision.process import ChildProcess, ServeError

HOPELESS = 2
"""The exit code of an HTTP process that cannot start and would not a second time; it has said why on stderr."""
BACK_OFF_SECONDS = (0.1, 0.5, 2.0, 5.0)
"""Before the first, second, ... start after one that died; again from the first after one that had listened."""

log = logging.getLogger(__name__)


def command(settings: str) -> list[str]:
    """The command line of an HTTP process."""
    return [sys.executable, "-P", "-m", "server.front", settings]


class Front:
    """Keeps one HTTP process alive until it is stopped."""

    def __init__(self, name: str, command: Sequence[str], ended: Callable[[], bool]) -> None:
        """`ended` is called when a process has ended, and says whether it had come to listen."""
        self.name = name
        self.restarts = 0
        self.stopping = False
        self._command = command
        self._ended = ended
        self._process: ChildProcess | None = None
        self._waiting = ThreadPoolExecutor(max_workers=1)

    @property
    def pid(self) -> int | None:
        """Of its process, while there is one."""
        return None if self._process is None else self._process.pid

    async def keep(self) -> None:
        """Run the process until it has been told to stop and has ended. Raises ServeError where it cannot run at all."""
        failures = 0
        try:
            while not self.stopping:
                code, listened = await self._live()
                if self._told_to_stop():
                    return
                if code == HOPELESS and not listened:
                    raise ServeError("the HTTP process cannot start; it has said why")
                failures = 0 if listened else failures + 1
                pause = BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS) - 1)]
                log.error("%s ended with code %d; a new one starts in %.1f s", self.name, code, pause)
                await asyncio.sleep(pause)
                self.restarts += 1
        finally:
            self._waiting.shutdown(wait=False)

    def signal(self, number: int) -> None:
        """Send its process a signal."""
        if self._process is not None:
            self._process.signal(number)

    def _told_to_stop(self) -> bool:
        return self.stopping

    async def _live(self) -> tuple[int, bool]:
        """One process to its end: its exit code, and whether it had come to listen."""
        with ChildProcess(self._command) as process:
            self._process = process
            try:
                code = await asyncio.get_running_loop().run_in_executor(self._waiting, process.wait)
                return code, self._ended()
            finally:
                self._process = None
                process.kill()  # which ends the wait in the other thread, where this task was cancelled
