"""The layers of X-ViT: its shift, attention, block and temporal head, against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from xvit_cases import naive_attention, naive_shift, roughen, tiny

from vidattn.models.xvit import Attention, Block, TemporalShift, VitHead, make_temporal_shift, shift_channels


def shifted(dim: int, num_heads: int, n_segment: int, n_div: int, **options: object) -> Attention:
    """Attention whose keys and values are shifted, as a model has it."""
    block = Block(dim, num_heads, qkv_bias=True, insert_control_point=True)
    network = nn.Module()
    network.blocks = nn.ModuleList([block])
    make_temporal_shift(network, n_segment, n_div, [0], **options)
    return roughen(block.attn).double().eval()


# The shift, one element after the other


@pytest.mark.parametrize(
    ("frames", "heads", "head_dim", "n_div"),
    [(8, 3, 16, 8), (4, 4, 16, 4), (3, 5, 8, 3), (1, 2, 6, 4), (2, 3, 4, 2), (2, 1, 7, 1), (5, 2, 4, 9), (3, 2, 5, 3)],
)
@pytest.mark.parametrize(("per_head", "window"), [(False, 1), (True, 1), (False, 2), (True, 2)])
def test_shift(frames: int, heads: int, head_dim: int, n_div: int, per_head: bool, window: int) -> None:
    shift = TemporalShift(nn.Identity(), frames, n_div, per_head, window)
    x = torch.randn(2 * frames, heads, 3, head_dim, requires_grad=True)
    result = shift(x)
    assert torch.equal(result, naive_shift(x.detach(), frames, n_div, per_head, window))
    # Its adjoint is the shift the other way.
    cotangent = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(result, x, cotangent)
    back = [(first, last, -offset) for first, last, offset in shift.channel_shifts(heads, head_dim)]
    tokens = shift_channels(cotangent.transpose(1, 2).flatten(2), frames, back)
    assert torch.equal(gradient, tokens.unflatten(2, (heads, head_dim)).transpose(1, 2))


def test_published_shifts() -> None:
    def ranges(n_div: int, heads: int = 12, **options: object) -> tuple[tuple[int, int, int], ...]:
        return TemporalShift(nn.Identity(), 8, n_div, **options).channel_shifts(heads, 64)

    assert ranges(8) == ((0, 96, 1), (96, 192, -1))  # head 1 is half and half
    assert ranges(4) == ((0, 192, 1), (192, 384, -1))  # heads 0 to 2, 3 to 5
    assert ranges(8, heads=16) == ((0, 128, 1), (128, 256, -1))
    assert ranges(2) == ((0, 384, 1), (384, 768, -1))
    assert ranges(1) == ((0, 768, 1),)
    assert ranges(1000) == ()
    assert ranges(8, heads=2, per_head=True) == ((0, 8, 1), (8, 16, -1), (64, 72, 1), (72, 80, -1))
    assert ranges(8, window=2) == ((0, 48, 1), (48, 96, -1), (96, 144, 2), (144, 192, -2))


def test_what_is_beyond_a_segment_stays_out_of_it() -> None:
    x = torch.ones(8, 2, 3, 4)
    x[4:] = float("nan")
    x[3, 0, 0, 0] = float("inf")
    result = TemporalShift(nn.Identity(), 4, 4)(x)
    assert not result[:4].isnan().any()
    assert result[2, 0, 0, 0] == float("inf")
    assert not result[3, 0, :, :2].any()  # from the frame after
    assert not result[0, 0, :, 2:].any()  # from the frame before


def test_a_shift_keeps_what_was_in_its_place() -> None:
    shift = TemporalShift(nn.Linear(4, 4), 2, 2)
    x = torch.randn(4, 2, 3, 4)
    assert torch.equal(shift(x), shift.net(TemporalShift(nn.Identity(), 2, 2)(x)))
    assert list(shift.state_dict()) == ["net.weight", "net.bias"]
    assert not TemporalShift(nn.Identity()).state_dict()


# Attention


@pytest.mark.parametrize(
    ("dim", "heads", "frames", "n_div"),
    [(12, 3, 4, 4), (24, 3, 1, 8), (10, 2, 3, 3), (12, 4, 2, 2), (8, 2, 5, 1), (6, 1, 2, 9)],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"per_head": True}, {"window": 2}, {"summary_token": True}, {"window": 2, "summary_token": True}],
    ids=str,
)
def test_attention(dim: int, heads: int, frames: int, n_div: int, options: dict[str, Any]) -> None:
    attention = shifted(dim, heads, frames, n_div, **options)
    clips = torch.randn(2, frames, 5, dim, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([naive_attention(attention, clip) for clip in clips])
        torch.testing.assert_close(attention(clips.flatten(0, 1)), expected.flatten(0, 1), rtol=1e-11, atol=1e-11)


def test_a_head_that_is_wholly_shifted_sees_nothing_at_the_end_of_a_segment() -> None:
    attention = shifted(8, 4, n_segment=3, n_div=4)  # head 0 reads the frame after, head 1 the one before
    attention.proj = nn.Identity()
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    context = attention(x)
    assert not context[2, :, :2].any()
    assert not context[0, :, 2:4].any()
    assert context[:2, :, :2].all() and context[1:, :, 2:4].all() and context[:, :, 4:].all()


def test_qk_scale_of_none_or_zero_is_the_default() -> None:
    assert Attention(8, 2, qk_scale=None).scale == 0.5
    assert Attention(8, 2, qk_scale=0.0).scale == 0.5
    assert tiny(qk_scale=0.3).base_model.blocks[1].attn.scale == 0.3


def test_attention_without_places_for_shifts() -> None:
    attention = Attention(8, 2)
    assert not any(name.startswith("control_point") for name, _ in attention.named_modules())
    assert attention.qkv.bias is None
    places = Attention(8, 2, insert_control_point=True)
    x = torch.randn(2, 3, 8)
    places.load_state_dict(attention.state_dict(), strict=True)
    assert torch.equal(places(x), attention(x))


# Blocks and the head


def test_drop_path_drops_single_frames() -> None:
    block = roughen(Block(12, 3, drop_path=0.5)).train()
    seen: list[tuple[Tensor, Tensor]] = []
    block.drop_path.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    block(torch.randn(16, 5, 12))
    assert len(seen) == 2
    for branch, output in seen:
        kept = output.flatten(1).any(dim=1)
        assert 0 < int(kept.sum()) < 16
        assert torch.equal(output[kept], branch[kept] * 2)


def test_the_temporal_head_does_not_see_the_order_of_frames() -> None:
    head = roughen(VitHead(24, 5, 2, 2, 10)).eval()
    frames = torch.randn(2, 7, 24)
    torch.testing.assert_close(head(frames.flip(1), torch.arange(7)), head(frames), rtol=1e-4, atol=1e-5)


def test_dropout_of_the_temporal_head() -> None:
    head = VitHead(24, 5, 2, num_layers=2, attn_drop=0.1, drop=0.2, dropout_rate=0.3)
    assert head.mlp_head[3].p == 0.3
    assert len(head.temporal_encoder) == 2
    for block in head.temporal_encoder:
        assert block.attn.attn_drop.p == 0.1
        assert block.attn.proj_drop.p == block.mlp.drop.p == block.drop_path.drop_prob == 0.2
        assert block.norm1.eps == block.norm2.eps == head.mlp_head[0].eps == 1e-5
        assert block.attn.qkv.bias is None
