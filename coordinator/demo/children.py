"""Run the parts of the demonstration that need torch, scikit-learn or matplotlib in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.errors import FedChordError

_KILL_SECONDS = 5.0


class Child:
    """A Python module that runs in another process, and is ended with the block that it is used in."""

    def __init__(self, module: str, arguments: Sequence[str | Path], *, folder: Path) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the demonstration, which then ends it
        )

    def output(self) -> str:
        """Wait for it to end and return what it printed; raise FedChordError with its last words if it failed."""
        out, err = self._process.communicate()
        if self._process.returncode != 0:
            words = [line for line in err.splitlines() if line.strip()]
            raise FedChordError(f"{self._module} failed: {words[-1] if words else f'exit {self._process.returncode}'}")
        return out

    def result(self) -> dict[str, Any]:
        """Wait for it to end and return the JSON object that it printed."""
        found: dict[str, Any] = json.loads(self.output())
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate(timeout=_KILL_SECONDS)
