"""What a part of the measurements writes. Every row is saved at once, so a kill loses at most the row in progress."""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lesa.files.atomic import write_text
from lesa.reports.environment import describe_environment

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "diffusers", "cache-dit", "inkan")

Row = dict[str, Any]


class Part:
    """The device, the time limit, and the rows so far.

    Args:
        folder: where ``NAME.json`` and logs are written.
        name: of the part.
        smoke: tiny sizes.
        budget: seconds; a part skips what it has no time for.
        commit: of the code, where the machine does not have its history; None: ask git.
    """

    def __init__(self, folder: Path, name: str, *, smoke: bool, budget: float, commit: str | None = None) -> None:
        self.folder, self.name, self.smoke = folder, name, smoke
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._began = time.monotonic()
        self._end = self._began + budget
        environment = describe_environment(PACKAGES)
        environment["commit"] = commit or environment["commit"]
        self.result: dict[str, Any] = {"environment": environment, "smoke": smoke, "finished": False, "seconds": 0.0}
        self.result |= {"rows": [], "skipped": [], "failed": []}
        self.save()

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds left."""
        return self._end - time.monotonic()

    def add(self, row: Row) -> None:
        self.result["rows"].append(row)
        self.save()

    def skip(self, line: str) -> None:
        print(f"skipped: {line}", flush=True)
        self.result["skipped"].append(line)
        self.save()

    def fail(self, what: str, error: BaseException | str) -> str:
        """Record a failure and return its message."""
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {str(error).strip()[:500]}"
        line = f"{what}: {reason}"
        print(f"FAILED {line}", flush=True)
        self.result["failed"].append(line)
        self.save()
        return line

    def finish(self) -> None:
        self.result["finished"] = True
        self.save()

    def save(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self._began, 1)
        write_text(self.folder / f"{self.name}.json", json.dumps(self.result, indent=1) + "\n")

    def command(self, command: Sequence[str], **environment: str) -> tuple[int | None, list[str]]:
        """Run a command whose output goes to ``NAME.txt`` as it comes; its status (None: no time left) and lines."""
        path = self.folder / f"{self.name}.txt"
        with path.open("ab") as file:
            begin = file.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )
            try:
                status = process.wait(timeout=max(1.0, self.left))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = None
        return status, path.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
