"""compute-sanitizer's memcheck on every kernel, on small and odd sizes; on a CPU the same calls without it."""

import os
import re
import shutil
import sys
from importlib.util import find_spec

from benchmarks.gpu.part import Part


def measure(part: Part) -> None:
    command = [sys.executable, "-m", "benchmarks.sanitize", *(["--few"] if part.smoke else [])]
    if part.on_gpu:
        found = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
        if found is None:
            part.skip("compute-sanitizer is not installed")
            return
        only_ours = ["--kernel-regex", "kns=_kernel"]  # with those of PyTorch it takes minutes
        command = [found, "--tool", "memcheck", *only_ours, "--error-exitcode", "9", *command]
    elif not find_spec("triton"):
        part.skip("triton is not installed")
        return
    status, lines = part.command(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summary = [line for line in lines if re.search(r"ERROR SUMMARY|were right", line)]
    part.add({"what": "memcheck", "status": status, "summary": summary})
    if status != 0:
        part.fail("memcheck", "not done in time" if status is None else "\n".join(lines[:8]))
