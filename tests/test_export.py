"""Models and ops as ONNX programs, traces and files: standard operators, the numbers of the model, any batch."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from model_cases import MODELS, clips, tiny
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.utils._pytree import tree_leaves

import vidattn


class Calls(nn.Module):
    """Functions as a module: each of an input of its own."""

    def __init__(self, *functions: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return tree_leaves([function(x) for function, x in zip(self.functions, inputs, strict=True)])


# The function, and the shape of its tensor behind the batch.
OPS: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...]]] = {
    "window3d": (
        lambda x: vidattn.window3d_attention(
            x,
            torch.linspace(-1, 1, 54).view(27, 2),
            window_size=(2, 2, 2),
            shift_size=1,
            pad_qkv=torch.linspace(-1, 1, 12).view(3, 2, 2),
        ),
        (3, 4, 3, 3, 2, 2),
    ),
    "window": (
        lambda x: vidattn.window_attention(
            x.flatten(0, 1), torch.linspace(-1, 1, 18).view(2, 3, 3), torch.eye(3).expand(2, 3, 3)
        ),
        (2, 3, 3, 2, 2),
    ),
    "temporal": (lambda x: vidattn.temporal_attention(x, 3, token_order="hwt"), (6, 3, 2, 2)),
    "three tensors": (lambda x: vidattn.temporal_attention(x.unbind(-3), 3), (6, 3, 2, 2)),
    "spatial": (lambda x: vidattn.spatial_attention(x, 2, token_order="hwt"), (6, 3, 2, 2)),
    "cls mean": (lambda x: vidattn.spatial_attention(x, 2, cls_token="mean"), (5, 3, 2, 2)),
    "cls per frame": (lambda x: vidattn.spatial_attention(x, 2, cls_token="per_frame"), (5, 3, 2, 2)),
    "factorized": (lambda x: vidattn.factorized_dot_product_attention(x, 2), (6, 3, 2, 2)),
    "mixing": (
        lambda x: vidattn.space_time_mixing_attention(x.flatten(0, 1), 2, shift_div=3),
        (2, 3, 3, 2, 2),
    ),
    "shift": (lambda x: vidattn.temporal_shift(x.flatten(0, 1), 2, [(0, 1, 1), (2, 3, -1)]), (2, 4, 3)),
}


def export(module: nn.Module, *inputs: Tensor) -> Any:
    batch = {0: torch.export.Dim.DYNAMIC}
    shapes = ((batch,) * len(inputs),) if isinstance(module, Calls) else (batch,)
    return torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)


def check_program(program: Any, module: nn.Module, *inputs: Tensor) -> None:
    """An exported module has standard operators alone, tensors of rank 8 at most, and the module's results."""
    for node in program.model.graph.all_nodes():
        assert node.domain == "", node
        assert all(value.shape is None or len(value.shape) <= 8 for value in node.outputs), node
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [place.name for place in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    with torch.no_grad():
        expected = tree_leaves(module(*inputs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, atol=1e-5, rtol=1e-5)


FAMILIES = ("video_swin_t", "timesformer_base", "vivit_b_factorized_self_attention", "xvit_b16_8f")


every_architecture = pytest.mark.parametrize(
    "name", [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)


@every_architecture
def test_onnx_of_every_architecture(name: str) -> None:
    model = tiny(name)
    program = export(model, clips(2))
    for batch in (1, 3):
        check_program(program, model, clips(batch))


@every_architecture
def test_onnx_of_every_architecture_accelerated(name: str) -> None:
    model, fast = tiny(name), tiny(name)
    assert vidattn.accelerate(fast).swapped
    program = export(fast, clips(2))
    for batch in (1, 3):
        check_program(program, model, clips(batch))


def test_onnx_of_every_op() -> None:
    module = Calls(*(function for function, _ in OPS.values())).eval()
    inputs, others = ([torch.randn(batch, *shape) for _, shape in OPS.values()] for batch in (2, 3))
    check_program(export(module, *inputs), module, *others)


def test_onnx_of_an_exported_program() -> None:
    """The program itself holds the op, which becomes standard operators on the way to ONNX."""
    function, shape = OPS["window3d"]
    module, x = Calls(function).eval(), torch.randn(2, *shape)
    program = torch.export.export(module, (x,))
    assert "vidattn.window3d_attention" in str(program.graph)
    torch.testing.assert_close(program.module()(x), module(x))
    check_program(torch.onnx.export(program, dynamo=True, verbose=False), module, x)


def test_traces_of_every_architecture() -> None:
    for name in MODELS:
        model, fast = tiny(name), tiny(name)
        vidattn.accelerate(fast)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            for module in (model, fast):
                trace = torch.jit.trace(module, clips(2), check_trace=False)
                torch.testing.assert_close(trace(clips(3)), model(clips(3)), atol=1e-5, rtol=1e-5)
            torch.jit._get_trace_graph(fast, (clips(2),))  # what counts operations or draws graphs calls this


@pytest.mark.parametrize("name", OPS)
def test_traces_of_every_op(name: str) -> None:
    function, shape = OPS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        trace = torch.jit.trace(function, torch.randn(2, *shape))
    assert not any("vidattn::" in node.kind() for node in trace.inlined_graph.nodes())
    x = torch.randn(3, *shape, requires_grad=True)
    found, expected = trace(x), function(x)
    torch.testing.assert_close(found, expected)
    first, second = (torch.autograd.grad(tree_leaves(y)[-1].square().sum(), x) for y in (found, expected))
    torch.testing.assert_close(first, second)


READ = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program(x), expected, atol=1e-5, rtol=1e-5)
print("vidattn" in sys.modules)
"""


def read_elsewhere(code: str, *files: Path) -> subprocess.CompletedProcess[str]:
    """Read an exported program in a process that begins with this Python."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, files)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def exported(name: str) -> tuple[nn.Module, Any, Any]:
    """Give an accelerated model, its exported program, and that in the operators of PyTorch alone."""
    fast = tiny(name)
    assert vidattn.accelerate(fast).swapped
    with torch.no_grad():
        program = torch.export.export(fast, (clips(2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    calls = [node for node in program.graph.nodes if "vidattn" in str(node.target)]
    assert calls and not any(arg == [] for node in calls for arg in node.args)  # which AOTInductor hands on as None
    ops = {node.target for node in calls}
    plain = program.run_decompositions(get_decompositions(ops))
    assert not any("vidattn" in str(node.target) for node in plain.graph.nodes)
    return fast, program, plain


@pytest.mark.parametrize("name", FAMILIES)
def test_exported_programs_come_back(name: str, tmp_path: Path) -> None:
    """From a file, with another batch; in a process that knows nothing of this package if they were decomposed."""
    fast, program, plain = exported(name)
    torch.export.save(program, tmp_path / "ops.pt2")
    torch.export.save(plain, tmp_path / "plain.pt2")
    with torch.no_grad():
        expected = fast(clips(3))
        torch.testing.assert_close(torch.export.load(tmp_path / "ops.pt2").module()(clips(3)), expected)
    if name != FAMILIES[0]:
        return
    torch.save((clips(3), expected), tmp_path / "results")
    for file, code, said in (
        ("plain.pt2", READ, "False\n"),
        ("ops.pt2", f"import vidattn{READ}", "True\n"),
        ("ops.pt2", READ, None),
    ):
        child = read_elsewhere(code, tmp_path / file, tmp_path / "results")
        if said is None:  # the op is Python, which its process has to import
            assert child.returncode == 1 and "error when deserializing" in child.stderr, child.stderr
        else:
            assert child.returncode == 0 and child.stdout == said, child.stderr


RUN = """
import sys, torch, torch._inductor
program = torch._inductor.aoti_load_package(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program(x), expected, atol=1e-5, rtol=1e-5)
print("vidattn" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_packages_of_aotinductor(name: str, tmp_path: Path) -> None:
    """Compiled for other processes: with the kernels where this package is imported, on their own if decomposed."""
    fast, program, plain = exported(name)
    with torch.no_grad():
        torch.save((clips(3), fast(clips(3))), tmp_path / "results")
    there = f"import vidattn{RUN}"
    for kept, code, said in ((program, there, "True\n"), (program, RUN, None), (plain, RUN, "False\n")):
        file = tmp_path / f"{'ops' if kept is program else 'plain'}.pt2"
        if not file.exists():
            torch._inductor.aoti_compile_and_package(kept, package_path=str(file))
        child = read_elsewhere(code, file, tmp_path / "results")
        if said is None:
            assert child.returncode == 1 and "Could not find schema for vidattn::" in child.stderr, child.stderr
        else:
            assert child.returncode == 0 and child.stdout == said, child.stderr
