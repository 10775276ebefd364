"""Peak memory of one call, measured in a process of its own.

The number is what the highest resident memory during the call exceeds the resident memory before it by: the result and
everything temporary, not the inputs. The call has run once before, so compilation, thread pools and library tables do
not count. The process's allocator is told to return freed memory at once; else a call that only reuses freed memory
would look as if it needed none. On a GPU it is what torch's allocator handed out.

Importing torch takes seconds, so one process imports it, and each measurement is a fork of it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "MemoryError", "code -9")  # of the allocators, and of the system
NO_WORKERS = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # a process that has threads cannot be forked safely


def peak_extra_bytes(
    builder: str, *, threads: int | None = None, most: int | None = None, **arguments: object
) -> int | None:
    """Measure the peak extra memory of a call in a new process.

    Args:
        builder: ``"module:function"``; the function takes ``arguments`` and returns the callable to measure.
        threads: of torch; None for its own choice.
        most: bytes that the process may add to what it has before the call (Linux, on a CPU); None for no limit.
        arguments: JSON values; ``device``, if there is one, is where the call runs.

    Returns:
        Bytes, or None where the system does not tell.

    Raises:
        MemoryError: the call asked for more than ``most`` bytes, or than there are.
        RuntimeError: the process failed; the message has the end of its error output.
    """
    server = start_server()
    assert server.stdin is not None and server.stdout is not None
    request = {"path": sys.path, "builder": builder, "threads": threads, "most": most, "arguments": arguments}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        start_server.cache_clear()
        raise RuntimeError(f"{builder} {arguments}: the process that measures memory has ended")
    result = json.loads(answer)
    if any(sign in result.get("error", "") for sign in OUT_OF_MEMORY):
        raise MemoryError(f"{builder} {arguments}: out of memory")
    if "error" in result:
        raise RuntimeError(f"{builder} {arguments} failed in its own process:\n{result['error']}")
    return result["bytes"]


@cache
def start_server() -> subprocess.Popen[str]:
    """Start the process that the measurements are forks of."""
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.memory"],
        cwd=ROOT,
        env=os.environ | RETURN_FREED | NO_WORKERS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(server.kill)
    return server


def _limit(most: int) -> None:
    """Let this process add no more than so many bytes to what it has."""
    import resource

    (has,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(has) * 1024 + most, hard))


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    sys.path[:] = request["path"]
    try:
        import torch

        from vidattn.memory import PeakMemory

        if request["threads"]:
            torch.set_num_threads(request["threads"])
        module, _, function = request["builder"].partition(":")
        call = getattr(importlib.import_module(module), function)(**request["arguments"])
        if request["most"] is not None:
            _limit(request["most"])
        call()
        with PeakMemory(request["arguments"].get("device", "cpu")) as memory:
            result = call()
        del result
        return {"bytes": memory.growth}
    except Exception:
        return {"error": traceback.format_exc()[-2000:]}


def main() -> None:
    """Answer each line of stdin by a line of stdout."""
    for module in ("torch._dynamo", "torch._inductor.compile_fx", "vidattn.models"):
        importlib.import_module(module)

    for line in sys.stdin:
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.dup2(2, 1)  # the lines on stdout are answers
            os.write(writing, json.dumps(_measure(json.loads(line))).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            answer = pipe.read()
        _, status = os.wait()
        ended = {"error": f"the process ended with code {os.waitstatus_to_exitcode(status)}"}
        print(answer or json.dumps(ended), flush=True)


if __name__ == "__main__":
    main()
