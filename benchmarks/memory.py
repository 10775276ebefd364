"""Peak memory of one call, measured in a process of its own.

The number is what the highest resident memory during the call exceeds the resident memory before it by: the result and
everything temporary, not the inputs. The call has run once before, so compilation, thread pools and library tables do
not count. The process's allocator is told to return freed memory at once; else a call that only reuses freed memory
would look as if it needed none.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from vidattn.memory import PeakMemory

ROOT = Path(__file__).parent.parent
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def peak_extra_bytes(builder: str, **arguments: object) -> int | None:
    """Measure the peak extra memory of a call in a new process.

    Args:
        builder: ``"module:function"``; the function takes ``arguments`` and returns the callable to measure.
        arguments: JSON values.

    Returns:
        Bytes, or None where the system does not tell.

    Raises:
        RuntimeError: the process failed; the message has the end of its error output.
    """
    command = [sys.executable, "-m", "benchmarks.memory", builder, json.dumps(arguments)]
    environment = os.environ | RETURN_FREED
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{builder} {arguments} failed in its own process:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    module, _, function = sys.argv[1].partition(":")
    call = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    call()
    with PeakMemory() as memory:
        result = call()
    del result
    print(json.dumps(memory.growth))


if __name__ == "__main__":
    main()
