"""Random calls of every function on every backend that runs here, compared with the float64 reference.

``make fuzz N=10000`` draws as many as that, and others every time.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
from fuzz_cases import CUDA, FUNCTIONS, SLOW, Call, calls, check
from hypothesis import HealthCheck, given, settings

from vidattn.ops import mixing

EXAMPLES = int(os.environ.get("VIDATTN_FUZZ", "0"))
DEFAULT = 60 if CUDA else 25 if SLOW else 300
SETTINGS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
if not EXAMPLES:  # the same calls every time
    SETTINGS |= {"derandomize": True, "database": None}


def draw_calls(function: str, count: int) -> Callable[[], None]:
    """Give a test of that many calls."""

    @settings(max_examples=count, **SETTINGS)
    @given(call=calls(function))
    def draw(call: Call) -> None:
        check(call)

    return draw


@pytest.mark.parametrize("function", FUNCTIONS)
def test_random_calls(function: str) -> None:
    draw_calls(function, -(-(EXAMPLES or DEFAULT) * FUNCTIONS[function][1] // 25))()


@pytest.mark.slow
def test_a_wrong_result_shrinks_to_a_program_that_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is wrong in the last of more than three tokens."""
    launch = mixing.launch_functions

    def planted(backend: str) -> tuple[Callable[..., None], ...]:
        forward, *others = launch(backend)

        def wrong(call: Any, out: Any, lse: Any) -> None:
            forward(call, out, lse)
            if out.shape[1] > 3:
                out[:, -1] += 0.25

        return wrong, *others

    monkeypatch.setattr(mixing, "launch_functions", planted)
    with pytest.raises(AssertionError) as caught:
        draw_calls("space_time_mixing_attention", 100)()
    message = str(caught.value)
    assert message.startswith("cpu: out: off by 2.500e-01, allowed "), message
    program = textwrap.dedent(message.partition("This program makes the call:\n\n")[2])
    assert "torch.float32, 1, 4, 3, 1, 1)" in program, program  # one frame of four tokens
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(program, {})
    assert "out: cpu is off by 2.5e-01 in sum, plain PyTorch in the same dtype by " in shown.getvalue()
    # Elsewhere, without the fault, it runs too.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert re.match(r"out: cpu is off by \d\.\de-0[78] in sum", child.stdout), child.stdout
