"""Forks, threads, interrupts and failed allocations: what a matrix product of torch survives, the ops survive."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from attention_cases import BACKENDS

HERE = Path(__file__).parent
# What all the processes below begin with. Every call gives its context and gradients as one tensor.
BEGINNING = """
import os, random, resource, signal, sys, threading, time
import torch
import vidattn
from torch import Tensor

def windows(q: Tensor, table: Tensor) -> Tensor:
    return vidattn.window3d_attention(q, table, window_size=(2, 4, 4), shift_size=(1, 2, 2))

# The function, and the shapes of its tensors.
CALLS = {
    "windows": (windows, [(2, 4, 9, 9, 3, 2, 16), (3 * 7 * 7, 2)]),
    "dense": (vidattn.window_attention, [(12, 30, 3, 2, 16), (2, 30, 30)]),
    "time": (lambda x: vidattn.temporal_attention(x, 8), [(2, 8 * 20, 3, 2, 16)]),
    "space": (lambda x: vidattn.spatial_attention(x, 4, cls_token="mean"), [(2, 1 + 4 * 30, 3, 2, 16)]),
    "all": (lambda x: vidattn.spatial_attention(x, 4, cls_query="all"), [(2, 1 + 4 * 30, 3, 2, 16)]),
    "mixing": (lambda x: vidattn.space_time_mixing_attention(x, 4), [(8, 30, 3, 2, 16)]),
    "product": (lambda a, b: a @ b, [(300, 300), (300, 300)]),
}

def call(name: str) -> Tensor:
    function, shapes = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out))
    return torch.cat([x.detach().flatten() for x in (out, *grads)])

def check(name: str) -> None:
    assert torch.equal(call(name), EXPECTED[name]), name

torch.set_num_threads(4)
EXPECTED = {name: call(name) for name in CALLS}
"""


def run(code: str, seconds: float = 100, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python behind what all have in another process; one that does not end in time has status 124."""
    command = [sys.executable, "-W", "ignore", "-c", BEGINNING + code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "4", **environment}
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(command, 124, str(error.stdout), str(error.stderr))


def assert_runs(code: str) -> None:
    child = run(code)
    assert child.returncode == 0, f"{child.returncode}\n{child.stdout[-1000:]}\n{child.stderr[-3000:]}"


def test_workers_of_a_data_loader() -> None:
    """They are forked from a process whose threads have worked, and have one thread each."""
    assert_runs("""
class Calls(torch.utils.data.Dataset):
    def __len__(self):
        return 4 * len(CALLS)
    def __getitem__(self, index):
        check(list(CALLS)[index % len(CALLS)])
        return index

loader = torch.utils.data.DataLoader(Calls(), batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=60)
for _ in range(2):
    assert torch.cat(list(loader)).tolist() == list(range(4 * len(CALLS)))
    for name in CALLS:
        check(name)
""")


@pytest.mark.parametrize("threads", [1, 4])
def test_a_fork_with_threads(threads: int) -> None:
    """OpenMP's may not work in a child of one that has used them: where a product ends, the ops do."""
    code = f"""
torch.set_num_threads({threads})
child = os.fork()
if child == 0:
    signal.alarm(SECONDS)
    check("NAME")
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
for name in CALLS:
    check(name)
"""

    def forked(name: str, seconds: int) -> str:
        return code.replace("NAME", name).replace("SECONDS", str(seconds))

    if run(forked("product", 5)).returncode == 0:
        for name in ("windows", "space", "mixing"):
            assert_runs(forked(name, 20))


def test_calls_from_many_threads_while_their_number_changes() -> None:
    assert_runs("""
failed, done = [], threading.Event()

def work(seed):
    draw = random.Random(seed)
    try:
        for _ in range(60):
            check(draw.choice([name for name in CALLS if name != "product"]))
    except BaseException as error:
        failed.append(error)

def change():
    while not done.is_set():
        for count in (1, 3, 2, 4):
            torch.set_num_threads(count)
            time.sleep(0.001)

workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
changer = threading.Thread(target=change)
changer.start()
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
done.set()
changer.join()
assert not failed, failed
""")


def test_interrupts() -> None:
    """At any time, in Python or in a kernel: the backend in force and the next call are what they were."""
    assert_runs(
        """
draw, interrupts = random.Random(0), 0
names = [name for name in CALLS if name != "product"]
for _ in range(60):
    signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 2e-2))
    try:
        with vidattn.use_backend("cpu" if not vidattn.why_not("window3d_attention", backend="cpu") else "reference"):
            while True:
                call(draw.choice(names))
    except KeyboardInterrupt:
        interrupts += 1
    assert vidattn.current_backend() == "auto"
    check(draw.choice(names))
assert interrupts == 60
""".replace("draw, interrupts", "signal.signal(signal.SIGALRM, signal.default_int_handler)\ndraw, interrupts", 1)
    )


def test_allocations_that_fail() -> None:
    """The error is one of memory, the call after it is right, and nothing stays behind."""
    assert_runs("""
def pages(which):
    return int(open("/proc/self/statm").read().split()[which]) * resource.getpagesize()

function, shapes = CALLS["windows"]
qkv = torch.randn(2, 8, 28, 28, 3, 4, 32).requires_grad_()  # 19 MB; the context and gradients are as much and half
table = torch.randn(3 * 7 * 7, 4).requires_grad_()

def step():
    out = function(qkv, table)
    torch.autograd.grad(out.sum(), (qkv, table))

step()
kinds, used = set(), []
for _ in range(3):
    for megabytes in range(0, 80, 4):
        resource.setrlimit(resource.RLIMIT_AS, (pages(0) + megabytes * 2**20, resource.RLIM_INFINITY))
        try:
            step()
            kinds.add("none")
        except (MemoryError, RuntimeError) as error:
            assert isinstance(error, MemoryError) or "memory" in str(error), error
            kinds.add("memory")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        check("windows")
    used.append(pages(1))
assert kinds == {"none", "memory"}, kinds
assert used[-1] - used[0] < 4e6, used
""")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cpu", "reference")])
def test_working_memory_that_is_missing(backend: str) -> None:
    """Of a thread of a kernel too: what it throws comes out as what it is."""
    assert_runs(f"""
backend = {backend!r}
qkv = torch.randn(1, 20, 20, 20, 3, 1, 64)  # one window, whose keys and values a thread packs
expected = torch.empty(1, 20, 20, 20, 64)  # as much as the context needs beside that
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
del expected
resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, resource.RLIM_INFINITY))
try:
    vidattn.window3d_attention(qkv, window_size=20, backend=backend)
    raise AssertionError("there was enough")
except MemoryError:
    assert backend == "cpu"
except RuntimeError as error:
    assert backend == "reference" and "memory" in str(error), error
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
check("windows")
""")


def test_no_memory_is_kept() -> None:
    assert_runs("""
def used():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

for _ in range(30):
    for name in CALLS:
        check(name)
before = used()
for _ in range(150):
    for name in CALLS:
        check(name)
assert used() - before < 4e6, (before, used())
""")
