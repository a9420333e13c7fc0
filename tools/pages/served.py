"""A server of a page: what `peftx serve` starts there, on a port that is free here, until the page comes to its end."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from pages.blocks import Block, BlockError, commands

PATIENCE = 120
"""Seconds for a server to begin, and to end."""


def starts_a_server(block: Block) -> bool:
    """Is it a console block that is `peftx serve`, and nothing else."""
    return block.language == "console" and block.body.startswith("$ peftx serve ")


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Served:
    """The server of a block.

    Args:
        ports: a port that the page says -> the one here; of all servers of the page.

    Attributes:
        shown: the page's line of the first line that it shows of the log, and these lines.

    Raises:
        BlockError: it does not begin.
    """

    def __init__(self, block: Block, ports: dict[str, str]) -> None:
        ((line, command, expected),) = commands(block)
        words = shlex.split(command, comments=True)
        self.said = words[words.index("--port") + 1]
        self.page, self.line, self.shown = block.page, line, (line + 1, expected)
        self.port = ports.setdefault(self.said, _free_port())
        words[words.index("--port") + 1] = self.port
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        with self._log.open("w") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "peftx_cli", *words[1:]], stdout=sink, stderr=subprocess.STDOUT
            )
        until = time.monotonic() + PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self._process.kill()
                raise BlockError(f"{self.page}:{line}: $ {command}: no answer\n{self._ended()}")
            time.sleep(0.1)

    def on_its_port(self, block: Block) -> Block:
        """A block as it stands, but for the port."""
        return replace(block, body=block.body.replace(f":{self.said}/", f":{self.port}/"))

    def _ended(self) -> str:
        """The log, once the process is no more."""
        self._process.wait()
        said = self._log.read_text("utf-8", errors="replace")
        self._folder.cleanup()
        return said

    def stop(self) -> str:
        """As Ctrl-C does; the log.

        Raises:
            BlockError: it ends with an error, or not at all.
        """
        self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
            self._process.kill()
        log = self._ended()
        if code != 0:
            raise BlockError(f"{self.page}:{self.line}: the server ended with {code}\n{log}")
        return log

    def _answers(self) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False
