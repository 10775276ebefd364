"""What the package for Hugging Face's kernel hub does once it is loaded, in a process of its own.

``python tests/hub_tasks.py FOLDER OTHER`` loads two builds beside vidattn. Triton's interpreter runs their kernels.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from kernels import (
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)
from torch import Tensor
from torchvision_swin import torchvision_swin3d

import vidattn

WINDOW = {"window_size": (2, 4, 4), "shift_size": (1, 2, 2)}


def run(function: Any, *tensors: Tensor, **options: Any) -> list[Tensor]:
    """Give the result of a function and the gradients of its tensors."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*inputs, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=0, atol=2e-5 * max(1.0, float(exact.detach().abs().max())))


def compare_ops(kernel: Any) -> None:
    """Windows that are shifted, padded and biased, and one op of each other family."""
    qkv, table = torch.randn(1, 3, 5, 6, 3, 2, 16), torch.randn(3 * 7 * 7, 2)
    assert not kernel.why_not("window3d_attention", qkv, table, **WINDOW, backend="triton")
    found = run(kernel.window3d_attention, qkv, table, **WINDOW)
    compare(found, run(vidattn.window3d_attention, qkv, table, **WINDOW, backend="reference"))
    tokens = torch.randn(1, 12, 3, 2, 16)
    found = run(kernel.temporal_attention, tokens, num_frames=4)
    compare(found, run(vidattn.temporal_attention, tokens, num_frames=4, backend="reference"))
    found = run(kernel.space_time_mixing_attention, torch.ones(4, 3, 3, 2, 16), num_frames=4)
    expected = run(vidattn.space_time_mixing_attention, torch.ones(4, 3, 3, 2, 16), num_frames=4, backend="reference")
    compare(found, expected)


def compare_layer(folder: Path) -> None:
    """Torchvision's module with the layer's forward, plain and compiled."""
    name = "ShiftedWindowAttention3d"
    original = torchvision_swin3d.ShiftedWindowAttention3d(16, [2, 4, 4], [1, 2, 2], num_heads=2)
    torch.nn.init.normal_(original.qkv.bias)
    module, video = copy.deepcopy(original), torch.randn(2, 3, 5, 6, 16)
    replace_kernel_forward_from_hub(torchvision_swin3d.ShiftedWindowAttention3d, name)
    with use_kernel_mapping({name: {"cpu": LocalLayerRepository(folder, layer_name=name)}}):
        kernelize(module, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
    assert module.forward.__func__ is not type(module).forward
    parameters = [dict(model.named_parameters()) for model in (original, module)]

    def call(model: torch.nn.Module, names: list[str]) -> Any:
        return lambda x, *values: torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    names = list(parameters[0])
    expected = run(call(original, names), video, *parameters[0].values())
    compare(run(call(module, names), video, *parameters[1].values()), expected)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compare([compiled(video)], expected[:1])


def main() -> None:
    folder, other = map(Path, sys.argv[1:])
    torch.manual_seed(0)
    first, second = get_local_kernel(folder), get_local_kernel(other)
    assert first.__name__ != second.__name__
    for kernel in (first, second):
        compare_ops(kernel)
    compare_layer(folder)
    namespaces = {kernel.ops._library.LIBRARY.ns for kernel in (first, second)}
    assert len(namespaces | {"vidattn"}) == 3
    print("as vidattn")


if __name__ == "__main__":
    main()
