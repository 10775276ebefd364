"""What tests of the GPU programs share: CUDA toolkits whose tools are scripts, and runs without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFORMANCE = ROOT / "tests" / "cuda_emulator" / "kernels" / "conformance.txt"


def toolkit(folder: Path, **tools: str) -> Path:
    """Make a CUDA toolkit whose tools are shell scripts."""
    (folder / "bin").mkdir(parents=True)
    for name, script in tools.items():
        tool = folder / "bin" / name.replace("_", "-")
        tool.write_text(f"#!/bin/sh\n{script}")
        tool.chmod(0o755)
    return folder


def compiler(printed: Path) -> str:
    """Give an nvcc that compiles whatever it is given to a program that prints a file."""
    return f"""for out; do test "$before" = -o && break; before=$out; done
printf '#!/bin/sh\\ncat {printed}\\n' > "$out" && chmod +x "$out"
"""


def start(program: str, out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{program}", "--mocked", "--processes", "2", "--out", str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
