"""What trainers put around the ops: checkpointing by op name, loss scaling, exported programs in other processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from model_cases import clips, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import vidattn

# By name of the op: a function of one tensor, and its shape.
OPS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "window3d_attention": (
        lambda x: vidattn.window3d_attention(x, window_size=2, shift_size=1, dropout_p=0.3),
        (2, 4, 3, 3, 3, 2, 4),
    ),
    "window_attention": (lambda x: vidattn.window_attention(x, dropout_p=0.3), (4, 5, 3, 2, 4)),
    "divided_attention": (lambda x: vidattn.temporal_attention(x, 3, dropout_p=0.3), (2, 12, 3, 2, 4)),
    "space_time_mixing_attention": (
        lambda x: vidattn.space_time_mixing_attention(x, 2, dropout_p=0.3),
        (4, 5, 3, 2, 4),
    ),
}


class Counted(TorchDispatchMode):
    """Counts the ops of this package that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vidattn":
            self.calls[func._schema.name.removeprefix("vidattn::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "recomputed"])
@pytest.mark.parametrize("name", OPS)
def test_selective_checkpointing_by_the_name_of_an_op(name: str, saved: bool) -> None:
    """An op that a policy saves runs once, another one twice, with the same dropout and the same gradients."""
    function, shape = OPS[name]
    op = getattr(torch.ops.vidattn, name).default
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return function(x * weight).sin()

    def policy(context: Any, called: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if saved and called == op else CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(1)
    expected = torch.autograd.grad(block(x).sum(), (x, weight))
    torch.manual_seed(1)
    with Counted() as counted:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        out: Any = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        found = torch.autograd.grad(out.sum(), (x, weight))
    assert counted.calls == {name: 1 if saved else 2, f"{name}_backward": 1}
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["video_swin_t", "timesformer_base", "vivit_b_factorized_encoder", "xvit_b16_8f"])
def test_training_with_scaled_losses(name: str) -> None:
    """Under autocast to float16, as on a GPU: the same steps as the plain model, and none after an overflow."""
    models, x = [tiny(name) for _ in range(2)], clips(2)  # in eval mode: no dropout
    vidattn.accelerate(models[1])
    losses: list[list[float]] = []
    for model in models:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses.append([])
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = nn.functional.cross_entropy(model(x).float(), torch.tensor([1, 3]))
            scaler.scale(loss * (1e30 if step == 2 else 1.0)).backward()
            before = [x.detach().clone() for x in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            moved = any(not torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))
            assert moved == (step != 2)
            losses[-1].append(loss.item())
        assert scaler.get_scale() == 2.0**12  # doubled after two steps, halved by the overflow
    assert losses[0][3] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
