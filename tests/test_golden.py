"""Every golden case: what the papers' own code computed, by the reference models and by the accelerated ones.

``VIDATTN_GOLDEN`` names the folders to search (separated by ":"); ``VIDATTN_BACKEND`` names the backend of the second
run. Where that computes in 16 bits alone, a result may be off as far as twice what plain PyTorch makes of the same
model in the same dtype, and it runs the cases of the architectures that it has kernels for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import BACKENDS_THAT_LEARN_A_DENSE_BIAS
from golden_cases import (
    LEVELS,
    GoldenCase,
    UnknownCaseError,
    assert_golden,
    compare_case,
    compare_with_plain,
    find_cases,
    run_case,
)
from twin_cases import CalledOps

import vidattn

CASES = find_cases()


def _device() -> torch.device:
    on_gpu = vidattn.current_backend() in ("cuda", "triton") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _dtypes() -> list[torch.dtype]:
    """Dtypes of the accelerated run: float32 and float64, or those of 16 bits if the backend in force has no others."""

    def runs(dtype: torch.dtype) -> bool:
        probe = torch.zeros(1, 1, 1, 1, 3, 1, 8, dtype=dtype, device=_device())
        return not vidattn.why_not("window3d_attention", probe, window_size=1)

    wide = [dtype for dtype in (torch.float32, torch.float64) if runs(dtype)]
    return wide or [dtype for dtype in (torch.bfloat16, torch.float16) if runs(dtype)] or [torch.float32]


def _runs() -> Iterator[Any]:
    for case in CASES:
        try:
            level = case.level
        except Exception:
            level = "unreadable"  # fails when it runs, and by its name
        kinds = [("function", torch.float32)]
        if level != "function":
            kinds = [("reference", dtype) for dtype in (torch.float32, torch.float64)]
            kinds += [("accelerated", dtype) for dtype in _dtypes()]
        for kind, dtype in kinds:
            yield pytest.param(case, kind, dtype, id=f"{case.name}-{kind}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize(("case", "kind", "dtype"), list(_runs()))
def test_golden(case: GoldenCase, kind: str, dtype: torch.dtype) -> None:
    assert case.level in LEVELS, f"level must be one of {', '.join(LEVELS)}, got {case.level!r}"
    family = case.family()
    if kind == "function":
        family.check_function(case)
        return
    run = family.build(case)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        if kind == "reference":
            compare_case(case, *run_case(case, run, dtype, _device()))
            return
        narrow = dtype.itemsize == 2
        if vidattn.current_backend() not in ("auto", *BACKENDS_THAT_LEARN_A_DENSE_BIAS) and case.level != "model":
            for name, parameter in run.module.named_parameters():  # of which blocks and modules make a dense bias
                parameter.requires_grad_(not name.endswith("relative_position_bias_table"))
        first = run_case(case, run, dtype, _device()) if narrow or not run.swaps else None
        acceleration = vidattn.accelerate(run.module)
        with CalledOps() as called:
            second = run_case(case, run, dtype, _device())
    if narrow:
        compare_with_plain(case, second, first)
    else:
        compare_case(case, *second)
    ours = {name for name in called.names if name.startswith("vidattn::")}
    if run.swaps:
        assert acceleration.swapped
        assert ours
    else:
        assert not acceleration.swapped
        assert not ours
        for results, others in zip(first, second):
            assert results.keys() == others.keys()
            for name, result in results.items():
                assert torch.equal(result, others[name]), name


@pytest.fixture
def block_case() -> GoldenCase:
    return next(case for case in find_cases(str(Path(__file__).parent / "golden")) if case.level == "block")


def test_a_wrong_number_fails(block_case: GoldenCase) -> None:
    outputs, gradients = run_case(block_case, block_case.family().build(block_case), torch.float32, _device())
    compare_case(block_case, outputs, gradients)
    for results in (outputs, gradients):
        for name, tensor in results.items():
            if not tensor.any():
                continue
            wrong = tensor.detach().clone()
            wrong.view(-1)[0] += 3e-4 * tensor.abs().max()
            with pytest.raises(AssertionError, match=name.rpartition(".")[2]):
                compare_case(
                    block_case,
                    {**outputs, name: wrong} if results is outputs else outputs,
                    {**gradients, name: wrong} if results is gradients else gradients,
                )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_fails(value: float) -> None:
    with pytest.raises(AssertionError, match="not finite"):
        assert_golden("output", torch.tensor([1.0, value]), torch.ones(2), 1e30)


def test_float64_is_compared_to_the_rounding_of_the_file() -> None:
    exact = torch.tensor([1.0, 1.0 / 3.0, 1e-3], dtype=torch.float64)
    assert_golden("output", exact, exact.float(), 1e-4)
    with pytest.raises(AssertionError, match="allowed"):
        assert_golden("output", exact + 1e-7, exact.float(), 1e-4)


def test_a_missing_or_an_extra_gradient_fails(block_case: GoldenCase) -> None:
    outputs, gradients = run_case(block_case, block_case.family().build(block_case), torch.float32, _device())
    name = "state.attn.qkv.weight"
    with pytest.raises(AssertionError, match=r"qkv\.weight is missing"):
        compare_case(block_case, outputs, {key: value for key, value in gradients.items() if key != name})
    with pytest.raises(AssertionError, match="original has none"):
        compare_case(block_case, outputs, {**gradients, "state.other": torch.zeros(1)})


def test_encoders_with_different_numbers_of_heads(tmp_path: Path) -> None:
    """A case like those of the paper's code, with 5 heads over space and 2 over time."""
    from safetensors.torch import save_file

    from vidattn.models.vivit import SpaceTimeViViT
    from vidattn.models.vivit_checkpoint import revert_state_dict

    torch.manual_seed(0)
    model = SpaceTimeViViT(24, 1, 5, 24, 1, 2, 3, (8, 8, 2), 20, num_frames=4, image_size=16, classifier="token").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    video, cotangent = (torch.randn(shape).double() for shape in ((1, 4, 16, 16, 3), (1, 3)))  # float32 holds them
    logits = model.double()(video.requires_grad_().movedim(-1, 1))
    logits.backward(cotangent)

    def scenic(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        tree = revert_state_dict(tensors, "scenic", num_heads=5, temporal_num_heads=2)
        return {prefix + name: tensor.detach().float().contiguous().clone() for name, tensor in tree.items()}

    tensors = {"input.x": video.detach(), "input.cotangent": cotangent, "output.logits": logits.detach()}
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    tensors |= {"grad.input.x": video.grad.float(), **scenic(model.state_dict(), "state.")}
    tensors |= scenic({name: parameter.grad for name, parameter in model.named_parameters()}, "grad.state.")
    config = {
        "patches": [8, 8, 2], "hidden_size": 20, "num_classes": 3, "classifier": "token", "run": {},
        "spatial_transformer": {"num_heads": 5, "mlp_dim": 24, "num_layers": 1},
        "temporal_transformer": {"num_heads": 2, "mlp_dim": 24, "num_layers": 1},
    }  # fmt: skip
    (tmp_path / "vivit").mkdir()
    peer = "scenic/projects/vivit/model.py SpaceTimeViViT"
    metadata = {"arch": "vivit", "level": "model", "peer": f"of {peer}", "config": json.dumps(config)}
    save_file(tensors, tmp_path / "vivit" / "heads.safetensors", metadata)
    (case,) = find_cases(str(tmp_path))
    run = case.family().build(case)
    compare_case(case, *run_case(case, run, torch.float64, _device()))


def test_an_unknown_case_fails(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for architecture, class_name in (("video_swin", "Nonsense"), ("nonsense", "SwinTransformerBlock3D")):
        file = tmp_path / architecture / "case.safetensors"
        file.parent.mkdir()
        metadata = {"arch": architecture, "level": "block", "config": f'{{"class": "{class_name}", "args": {{}}}}'}
        save_file({"input.x": torch.zeros(1)}, file, metadata)
    cases = find_cases(str(tmp_path))
    assert len(cases) == 2
    for case in cases:
        with pytest.raises(UnknownCaseError, match=r"(?i)nonsense"):
            case.family().build(case)


def test_a_folder_without_cases_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        find_cases(str(tmp_path))
