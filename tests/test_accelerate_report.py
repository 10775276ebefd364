"""What the report of ``accelerate`` says of the backends that will run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vidattn
from vidattn import backends
from vidattn.models import create_model
from vidattn.models.timesformer import Attention

TINY = {
    "video_swin_t": {"embed_dim": 16, "depths": (2,), "num_heads": (2,)},
    "timesformer_base": {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 32},
    "vivit_b_factorized_dot_product": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "image_size": 32},
    "xvit_b16_8f": {"embed_dim": 24, "depth": 1, "img_size": 32},
}
KERNEL = "cpu" if not vidattn.why_not("window3d_attention", backend="cpu") else "reference"


@pytest.fixture(autouse=True)
def automatic() -> None:
    vidattn.set_backend("auto")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process one whose extension was not built."""
    for op in vidattn.ops.__all__:
        monkeypatch.setitem(backends._kernel_missing, (op, "cpu"), lambda: "the extension is not built")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_swapped_module_names_its_backend(name: str, dtype: torch.dtype) -> None:
    model = create_model(name, **TINY[name]).to(dtype)
    report = vidattn.accelerate(model)
    attending = [row for row in report.swapped if row.twin.ops]
    assert attending and report.backends == {row.name: KERNEL for row in attending}
    text = str(report)
    assert all(
        f"{row.name} " in text and f"-> {row.twin.__name__}, backend {KERNEL}\n" in text + "\n" for row in attending
    )
    assert "no faster" not in text or KERNEL == "reference"


@pytest.mark.usefixtures("no_kernels")
def test_no_speed_is_promised_where_the_reference_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "build_command", lambda: "make-it")
    monkeypatch.setattr(backends, "pure_by_choice", lambda: False)
    report = vidattn.accelerate(create_model("timesformer_base", **TINY["timesformer_base"]))
    assert set(report.backends.values()) == {"reference"}
    last = str(report).splitlines()[-1]
    assert last == (
        "  the reference computes the same, but no faster than the model did before: cpu: the extension is not built. "
        "This builds them: make-it"
    )
    monkeypatch.setattr(backends, "pure_by_choice", lambda: True)
    assert "make-it" not in str(report) and "no faster" in str(report)
    report.revert()
    assert report.backends == {} and "no faster" not in str(report)


def test_a_named_backend_is_what_the_report_says() -> None:
    attention = Attention(16, num_heads=2)
    with vidattn.accelerate(attention, backend="reference") as report:
        assert report.backends == {"": "reference"}
        assert "no faster than the model did before: it was named" in str(report)
    with vidattn.use_backend("reference"), vidattn.accelerate(attention) as report:
        assert report.backends == {"": "reference"}
    with vidattn.use_backend("cuda"), vidattn.accelerate(attention) as report:
        assert report.backends[""].startswith("none: spatial_attention: backend 'cuda' (chosen by use_backend) cannot")


def test_wide_heads_and_other_devices() -> None:
    wide = vidattn.accelerate(Attention(260, num_heads=2))
    assert wide.backends == {"": "reference"}
    assert KERNEL == "reference" or ("up to 128, got 130" in str(wide) and "This builds" not in str(wide))
    meta = vidattn.accelerate(nn.Sequential(Attention(16, num_heads=2)).to("meta"))
    assert meta.backends == {"0": "chosen when it has a device"}
