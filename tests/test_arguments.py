"""What is no argument: every tensor of every function in forms that no kernel reads, and values of odd kinds."""

from __future__ import annotations

import doctest
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import vidattn
from vidattn import messages
from vidattn.messages import describe
from vidattn.models import create_model, get_input_spec, load_checkpoint

GRID, WINDOWS, CLIP, FRAMES = (torch.zeros(*shape, 3, 2, 8) for shape in ((1, 4, 6, 6), (4, 9), (1, 12), (6, 5)))
HUGE = list(range(100_000))


def replaced(packed: Tensor, place: int, value: Any) -> tuple[Any, ...]:
    parts = list(packed.unbind(-3))
    parts[place] = value
    return tuple(parts)


# Each tensor argument: the name in messages, a tensor that fits, and a call.
ARGUMENTS: list[tuple[str, Tensor, Callable[[Any], Any]]] = [
    ("window3d_attention: qkv", GRID, lambda x: vidattn.window3d_attention(x, window_size=(2, 3, 3))),
    (
        "window3d_attention: bias_table",
        torch.zeros(27, 2),
        lambda x: vidattn.window3d_attention(GRID, x, window_size=2),
    ),
    (
        "window3d_attention: pad_qkv",
        torch.zeros(48),
        lambda x: vidattn.window3d_attention(GRID, None, window_size=2, pad_qkv=x),
    ),
    ("window_attention: qkv", WINDOWS, lambda x: vidattn.window_attention(x)),
    ("window_attention: q", WINDOWS[:, :, 0], lambda x: vidattn.window_attention(replaced(WINDOWS, 0, x))),
    ("window_attention: k", WINDOWS[:, :, 0], lambda x: vidattn.window_attention(replaced(WINDOWS, 1, x))),
    ("window_attention: v", WINDOWS[:, :, 0], lambda x: vidattn.window_attention(replaced(WINDOWS, 2, x))),
    ("window_attention: bias", torch.zeros(2, 9, 9), lambda x: vidattn.window_attention(WINDOWS, x)),
    ("window_attention: mask", torch.zeros(2, 9, 9), lambda x: vidattn.window_attention(WINDOWS, None, x)),
    ("temporal_attention: qkv", CLIP, lambda x: vidattn.temporal_attention(x, 3)),
    ("spatial_attention: qkv", CLIP, lambda x: vidattn.spatial_attention(x, 3)),
    ("factorized_dot_product_attention: qkv", CLIP, lambda x: vidattn.factorized_dot_product_attention(x, 3)),
    ("space_time_mixing_attention: qkv", FRAMES, lambda x: vidattn.space_time_mixing_attention(x, 3)),
    ("temporal_shift: x", torch.zeros(6, 5, 16), lambda x: vidattn.temporal_shift(x, 3, [(0, 2, 1)])),
]

FORMS: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "nested rows": lambda x: torch.nested.nested_tensor(list(x.unbind())),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "numpy": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "text": lambda x: "x" * 10_000,
    "many": lambda x: HUGE,
    "dict": lambda x: dict.fromkeys(HUGE),
}
GOT = {
    "sparse": "expected a dense tensor, got layout torch.sparse_coo",
    "nested": "expected a dense tensor, got a nested tensor",
    "nested rows": "expected a dense tensor, got a nested tensor",
    "jagged": "expected a dense tensor, got a nested tensor",
    "quantised": "expected a dense tensor, got a quantised tensor",
    "numpy": "numpy.ndarray of shape (",
    "dict": "dict of 100000",
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:.*quantize_per_tensor")
@pytest.mark.parametrize(("name", "tensor", "call"), ARGUMENTS, ids=[name for name, _, _ in ARGUMENTS])
def test_tensors_that_no_kernel_reads_are_named(name: str, tensor: Tensor, call: Callable[[Any], Any]) -> None:
    call(tensor)
    of_three = name in ("window_attention: q", "window_attention: k", "window_attention: v")
    for form, make in FORMS.items():
        value = make(tensor)
        # q, k and v are one argument where they are no tensors.
        start = "window_attention: qkv" if of_three and not isinstance(value, Tensor) else name
        with pytest.raises((TypeError, ValueError)) as caught:
            call(value)
        text = str(caught.value)
        assert text.startswith(f"{start}: expected "), (form, text)
        assert GOT.get(form, ", got ") in text, (form, text)
        assert len(text) < 500, form


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_compressed_tables_are_named() -> None:
    with pytest.raises(TypeError, match=r"bias_table: expected a dense tensor, got layout torch\.sparse_csr"):
        vidattn.window3d_attention(GRID, torch.zeros(75, 2).to_sparse_csr(), window_size=(2, 3, 3))


OPTIONS: list[tuple[str, Callable[[Any], Any]]] = [
    ("window3d_attention: window_size", lambda x: vidattn.window3d_attention(GRID, window_size=x)),
    ("window3d_attention: shift_size", lambda x: vidattn.window3d_attention(GRID, window_size=2, shift_size=x)),
    ("window3d_attention: wrap", lambda x: vidattn.window3d_attention(GRID, window_size=2, wrap=x)),
    ("window3d_attention: bias_index", lambda x: vidattn.window3d_attention(GRID, window_size=2, bias_index=x)),
    ("window3d_attention: backend", lambda x: vidattn.window3d_attention(GRID, window_size=2, backend=x)),
    ("temporal_attention: token_order", lambda x: vidattn.temporal_attention(CLIP, 3, token_order=x)),
    ("spatial_attention: cls_token", lambda x: vidattn.spatial_attention(CLIP, 3, cls_token=x)),
    ("temporal_shift: channel_shifts", lambda x: vidattn.temporal_shift(FRAMES, 3, x)),
    ("temporal_shift: channel_shifts", lambda x: vidattn.temporal_shift(FRAMES, 3, [x])),
    ("explain_windows: grid", lambda x: vidattn.explain_windows(x, 2)),
    ("explain_windows: window_size", lambda x: vidattn.explain_windows((4, 4, 4), x)),
    ("set_backend: name", vidattn.set_backend),
    ("use_backend: name", lambda x: vidattn.use_backend(x).__enter__()),
    ("why_not: op", vidattn.why_not),
    ("why_not: backend", lambda x: vidattn.why_not("window_attention", backend=x)),
    ("warmup: model", lambda x: vidattn.warmup(x, torch.zeros(1))),
]
ODD = [
    [],
    {},
    "x" * 10_000,
    HUGE,
    numpy.zeros((2, 3)),
    torch.zeros(2, 3),
    b"cpu",
    object(),
    nn.Identity,
    10**5000,
    -(2**63) - 1,
]


@pytest.mark.parametrize(("name", "call"), OPTIONS)
def test_options_of_odd_kinds_are_named(name: str, call: Callable[[Any], Any]) -> None:
    for value in ODD:
        if name.endswith("channel_shifts") and isinstance(value, list) and not value:
            continue  # no shift at all, or a range of no numbers: see test_mixing_op.py
        with warnings.catch_warnings(), pytest.raises((TypeError, ValueError)) as caught:
            warnings.simplefilter("error")
            call(value)
        text = str(caught.value)
        assert text.startswith(f"{name}: expected ") and ", got " in text, text
        assert len(text) < 500


@pytest.mark.parametrize("size", [2**63, (2, 2**63, 2), 2**200, -(2**63)])
def test_sizes_past_64_bits_are_named(size: Any) -> None:
    for call in (
        lambda: vidattn.window3d_attention(GRID, window_size=size),
        lambda: vidattn.explain_windows((4, 4, 4), size),
    ):
        with pytest.raises(ValueError, match=r"window_size: expected values (below 2\*\*63|of at least 1), got "):
            call()
    expected = vidattn.window3d_attention(GRID, window_size=8)
    assert torch.equal(vidattn.window3d_attention(GRID, window_size=2**63 - 1), expected)


def test_offsets_past_64_bits_are_named() -> None:
    x = torch.randn(6, 5, 16, requires_grad=True)
    for offset in (2**63, -(2**63), 2**70):
        # -2**63 has 64 bits, but its negative, which the gradient needs, has not.
        expected = r"channel_shifts: expected (an integer of 64 bits|.* with an offset below 2\*\*63 in size), got "
        with pytest.raises(ValueError, match=expected):
            vidattn.temporal_shift(x, 3, [(0, 2, offset)])
        with pytest.raises(ValueError, match=expected):
            vidattn.space_time_mixing_attention(FRAMES, 3, channel_shifts=[(0, 2, offset)])
    for backend in ("auto", "reference"):
        for offset in (2**63 - 1, 1 - 2**63, 2**31):
            shifted = vidattn.temporal_shift(x, 3, [(0, 2, offset)], backend=backend)
            (grad,) = torch.autograd.grad(shifted.sum(), x)
            assert not shifted[..., :2].any() and torch.equal(shifted[..., 2:], x[..., 2:])
            assert not grad[..., :2].any() and (grad[..., 2:] == 1).all()


def test_numbers_of_other_libraries_are_sizes() -> None:
    expected = vidattn.window3d_attention(GRID, window_size=2)
    for size in (numpy.int64(2), (numpy.int32(2), torch.tensor(2), 2)):
        assert torch.equal(vidattn.window3d_attention(GRID, window_size=size), expected)


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "None"),
        ((0, 4, 1.5), "(0, 4, 1.5)"),
        ("a\nb", "'a\\nb'"),
        (torch.zeros(2, 3), "tensor (2, 3)"),
        (numpy.zeros((2, 3)), "numpy.ndarray of shape (2, 3)"),
        (numpy.float32(2.5), "numpy.float32(2.5)"),
        ([torch.zeros(2)] * 9, "list of 9: tensor (2,), tensor (2,), tensor (2,), tensor (2,), ..."),
        ([[[[0]]]], "list of 1: list of 1: list of 1"),
        (Broken(), "a Broken"),
        (nn.Identity(), "Identity()"),
        ("x" * 1000, "'" + "x" * 76 + "..."),
    ],
)
def test_descriptions(value: Any, expected: str) -> None:
    assert describe(value) == expected


def test_a_list_in_itself_is_described() -> None:
    value: list[Any] = []
    value += [value, value]
    assert len(describe(value)) < 200
    assert describe(10**5000) == "a int"


def test_examples() -> None:
    assert doctest.testmod(messages).failed == 0


def test_calls_that_why_not_cannot_make() -> None:
    with pytest.raises(
        TypeError, match=r"why_not: \*args: expected the arguments of window3d_attention, .*'window_size'"
    ):
        vidattn.why_not("window3d_attention", GRID)
    with pytest.raises(TypeError, match=r"expected the arguments of temporal_shift, got others: .*'frames'"):
        vidattn.why_not(vidattn.temporal_shift, FRAMES, 3, [(0, 2, 1)], frames=3)


@pytest.mark.parametrize("value", [-1, 2**40, True, 2.5, None, "5", numpy.float32(5), [5], 10**100])
def test_numbers_of_classes_are_named(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="create_model: num_classes: expected "):
        create_model("video_swin_t", num_classes=value)


@pytest.mark.parametrize("call", [create_model, get_input_spec])
def test_names_of_models_are_named(call: Callable[[Any], Any]) -> None:
    for value in (None, [], HUGE, torch.zeros(3), "x" * 10_000, b"xvit_b16_8f", "video_swin"):
        with pytest.raises((TypeError, ValueError), match=f"{call.__name__}: name: expected one of .*, got ") as caught:
            call(value)
        assert len(str(caught.value)) < 700  # it lists the names
    small = {"embed_dim": 8, "depths": (1,), "num_heads": (1,)}
    assert create_model("video_swin_t", num_classes=numpy.int64(5), **small).cls_head.fc_cls.out_features == 5


@pytest.mark.parametrize("value", [None, 3, [], HUGE, torch.zeros(3), numpy.zeros(3), nn.Identity(), b"x", "x" * 9999])
def test_checkpoints_of_odd_kinds_are_named(value: Any) -> None:
    model = create_model("video_swin_t", embed_dim=8, depths=(1,), num_heads=(1,))
    with pytest.raises((TypeError, FileNotFoundError), match="load_checkpoint: path_or_state: expected ") as caught:
        load_checkpoint(model, value)
    assert len(str(caught.value)) < 500
    if not isinstance(value, nn.Module):
        with pytest.raises(TypeError, match=r"load_checkpoint: model: expected one of .*, got"):
            load_checkpoint(value, model.state_dict())
