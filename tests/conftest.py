"""Settings of all tests."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator

import pytest

# Several processes run tests side by side: threads that wait for work give their core to another process. A pytest that
# a test starts is none of these processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.pop("PYTEST_XDIST_WORKER", None)

import torch
from imported_copy import describe, why_refused

import vidattn
from vidattn.backends import TRITON_INTERPRETED

# As TRITON_INTERPRET does for Triton: where there is no GPU, the backend "cuda" runs on an emulated one.
CUDA_EMULATED = os.environ.get("VIDATTN_BACKEND") == "cuda" and not torch.cuda.is_available()
if CUDA_EMULATED:
    from tests import cuda_emulator

    cuda_emulator.install()

if TRITON_INTERPRETED:
    # At every call of a function from a kernel the interpreter looks for what to replace in Triton's language, which
    # takes a third of its time. In a process that compiles nothing, replacing it once is enough.
    import interpreted_bfloat16
    from triton.language import standard
    from triton.runtime import interpreter

    from vidattn.kernels import rows

    for function in (rows.load_rows, standard.zeros):  # one that sees triton.language, one that sees its core
        interpreter._patch_lang(function.fn)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()  # with nothing to undo
    interpreted_bfloat16.mend()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill freshly allocated tensors, those of compiled kernels too, with NaN: an output left unwritten cannot pass."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def emulated_orders(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run half of the tests in another order of lanes, warps and copies, a third with the worst rounding allowed."""
    if not CUDA_EMULATED:
        yield
        return
    number = zlib.crc32(request.node.nodeid.encode())
    worst = number % 3 == 0
    unchecked = "seventy_thousand" in request.node.name  # which is about the grid
    if unchecked:
        cuda_emulator.install(checked=False)
    with cuda_emulator.controls(seed=number % 2 * 7, truncate=worst, approximate=worst):
        yield
    if unchecked:
        cuda_emulator.install()


@pytest.fixture(autouse=True)
def same_numbers_every_run() -> None:
    """Seed torch's generator, so that a test that failed fails again."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_backend_choice() -> Iterator[None]:
    """Undo what a test chose with ``set_backend``; each starts from what the environment says."""
    chosen = vidattn.current_backend()
    yield
    vidattn.set_backend(chosen)


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Keep no plans from before or after a test that changes how Triton calls are planned."""
    from vidattn.kernels import plans

    plans.forget()
    yield
    plans.forget()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=int, default=1, metavar="N", help="run every N-th case of each test")


def pytest_configure() -> None:
    refused = why_refused()
    if refused:
        raise pytest.UsageError(refused)


def pytest_report_header() -> str:
    return describe()


@pytest.hookimpl(trylast=True)  # what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what --share does, and what runs a Triton kernel where none can.

    test_triton_interpreter.py runs the latter in other processes.
    """
    without_triton = bool(vidattn.why_not("window3d_attention", backend="triton"))
    cases: Counter[tuple[object, str]] = Counter()
    kept, left_out = [], []
    for item in items:
        test = (item.path, getattr(item, "originalname", item.name))
        shared_out = cases[test] % config.getoption("--share") > 0
        cases[test] += 1
        needs_triton = item.get_closest_marker("needs_triton") is not None
        (left_out if shared_out or (needs_triton and without_triton) else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
