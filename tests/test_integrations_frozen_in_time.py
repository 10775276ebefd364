"""Frozen in Time and its relatives: stand-ins with their attention swapped."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from integration_cases import Integration, Target, admit, run
from standin_frozen_in_time import Attention, Block, VarAttention

import vidattn
from vidattn.integrations import frozen_in_time

_target = partial(
    Target, inputs=lambda: {"x": torch.randn(2, 1 + 4 * 5, 24)}, integration="frozen_in_time", stand_in=True
)
TARGETS = [
    _target(
        "m-bain/frozen-in-time",
        "SpaceTimeTransformer",
        partial(Block, VarAttention, 24, 3, 4),
        attention=("VarAttention",),
    ),
    _target(
        "facebookresearch/LaViLa",
        "SpaceTimeTransformer",
        partial(Block, VarAttention, 24, 3, 4, as_one=True),
        attention=("VarAttention",),
    ),
    _target(
        "lucidrains/TimeSformer-pytorch",
        "TimeSformer",
        partial(Block, Attention, 24, 3, 4),
        attention=("Attention",),
    ),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass


@pytest.mark.parametrize(
    "more",
    [{"mask": torch.ones(1, dtype=torch.bool)}, {"rot_emb": torch.full((1,), 2.0)}],
    ids=["mask", "rotary"],
)
def test_masks_and_rotary_embeddings(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS[2]
    model = target.make().attn
    admit(model, "frozen_in_time", monkeypatch)
    arguments = {"x": torch.randn(2, 21, 24), "einops_from": "b (f n) d", "einops_to": "(b f) n d", "f": 4, **more}
    before = run(model, arguments, grad=False)
    assert vidattn.accelerate(model).swapped
    after = run(model, arguments, grad=False)
    assert torch.equal(after.outputs[0], before.outputs[0]) and after.ops.forward == 0


@pytest.mark.parametrize(
    ("patterns", "sizes"),
    [
        (("b (n f) d", "(b f) n d"), {"f": 4}),
        (("b (f n) d", "b (f n) d"), {"f": 4}),
        (("b (f n) d", "(b f) n d"), {"f": 3}),
        (("b (f n) d", "(b f) n d"), {"f": 4, "n": 5}),
    ],
)
def test_other_patterns_are_not_taken(patterns: tuple[str, str], sizes: dict[str, int]) -> None:
    assert frozen_in_time._sequences(torch.empty(2, 21, 24), *patterns, sizes) is None


def test_where_kernels_know_no_such_cls_token() -> None:
    """On other devices the attention is put together of two: the same numbers."""
    qkv = torch.randn(2, 21, 3, 3, 8, dtype=torch.float64)
    whole = [frozen_in_time._attend(qkv, over, 4, 0.3, None) for over in ("time", "space")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_in_time, "_IN_ONE", ())
        parts = [frozen_in_time._attend(qkv, over, 4, 0.3, None) for over in ("time", "space")]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)
