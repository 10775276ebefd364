"""The cases that are timed: shapes of published models, and what each costs in arithmetic and memory traffic."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from vidattn.geometry import WindowGeometry, num_bias_rows, resolve_windows

DIRECTIONS = ("forward", "forward_backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class WindowCase:
    """One call of ``window3d_attention``: sizes in tokens, axes (depth, height, width)."""

    grid: tuple[int, int, int]
    window: tuple[int, int, int]
    shift: tuple[int, int, int]
    heads: int
    head_dim: int = 32
    batch: int = 1

    @property
    def geometry(self) -> WindowGeometry:
        return resolve_windows(self.grid, self.window, self.shift)

    @property
    def qkv_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.grid, 3, self.heads, self.head_dim)

    @property
    def table_shape(self) -> tuple[int, int]:
        return (num_bias_rows(self.window), self.heads)

    def flops(self, direction: str) -> int:
        """Operations of the matrix products: two forward; five backward, the recomputed scores included."""
        products = {"forward": 2, "forward_backward": 7}[direction]
        window_heads = self.batch * self.geometry.num_windows * self.heads
        return products * 2 * self.geometry.num_tokens**2 * self.head_dim * window_heads

    def bytes_moved(self, direction: str, dtype: torch.dtype) -> int:
        """Bytes that must cross memory at least: each input read once, each result written once."""
        tokens = self.batch * math.prod(self.grid)
        token_bytes = self.heads * self.head_dim * dtype.itemsize
        lse = tokens * self.heads * 4
        forward = 4 * tokens * token_bytes  # q, k, v, context
        if direction == "forward":
            return forward
        backward = 8 * tokens * token_bytes  # q, k, v, context and its gradient in; three gradients out
        return forward + lse + backward + lse


def _stage(depth: int, size: int, heads: int, *, shifted: bool, window: tuple[int, int, int] = (8, 7, 7)) -> WindowCase:
    shift = tuple(extent // 2 for extent in window) if shifted else (0, 0, 0)
    return WindowCase((depth, size, size), window, shift, heads)  # type: ignore[arg-type]


# Swin-T on 32 x 224 x 224 video has four stages of 2, 2, 6 and 2 blocks; every second block is shifted. In stage 4 the
# window covers the frame, so only the shift in time remains. Swin-B on Something-Something v2 has windows of 16 frames.
# "padded" is stage 1 on 320 x 240 video, whose 60 x 80 tokens are no multiple of the window. SwinUNETR (arXiv
# 2201.01266) with 48 features makes 48^3 tokens of a 96^3 volume, which its windows of 7^3 pad to 49^3.
WINDOW_CASES = {
    "swin_t_stage1": _stage(16, 56, 3, shifted=False),
    "swin_t_stage1_shifted": _stage(16, 56, 3, shifted=True),
    "swin_t_stage2": _stage(16, 28, 6, shifted=False),
    "swin_t_stage2_shifted": _stage(16, 28, 6, shifted=True),
    "swin_t_stage3": _stage(16, 14, 12, shifted=False),
    "swin_t_stage3_shifted": _stage(16, 14, 12, shifted=True),
    "swin_t_stage4": _stage(16, 7, 24, shifted=False),
    "swin_t_stage4_shifted": _stage(16, 7, 24, shifted=True),
    "swin_b_ssv2_stage1_shifted": _stage(16, 56, 4, shifted=True, window=(16, 7, 7)),
    "swin_b_ssv2_stage3": _stage(16, 14, 16, shifted=False, window=(16, 7, 7)),
    "padded_stage1_shifted": WindowCase((16, 60, 80), (8, 7, 7), (4, 3, 3), 3),
    "swinunetr_stage1_shifted": WindowCase((48, 48, 48), (7, 7, 7), (3, 3, 3), 3, head_dim=16),
}
# What a GPU is given: batches of eight clips. Swin-B has a third more heads. Eight frames make a grid four deep, which
# clips the window. A stage that its window covers has no shifted form.
GPU_WINDOW_CASES = {
    f"{model}_stage{stage}{'_shifted' if shifted else ''}": replace(case, batch=8)
    for model, depth, heads, window in (
        ("swin_t", 16, 3, (8, 7, 7)),
        ("swin_b", 16, 4, (8, 7, 7)),
        ("swin_b_ssv2", 16, 4, (16, 7, 7)),
        ("swin_t_8frames", 4, 3, (8, 7, 7)),
    )
    for stage, size in enumerate((56, 28, 14, 7), start=1)
    for shifted in (False, True)
    for case in [_stage(depth, size, heads << (stage - 1), shifted=shifted, window=window)]
    if not shifted or any(case.geometry.shift)
}
# Windows of other lengths, for the audit: 2D Swin-T on 64 images (49 tokens), Swin-B on 16 of 384 x 384 (144 tokens),
# SwinUNETR on two volumes (343 tokens).
GPU_OTHER_WINDOW_CASES = {
    "swin_2d_window7": WindowCase((1, 56, 56), (1, 7, 7), (0, 0, 0), 3, batch=64),
    "swin_2d_window12": WindowCase((1, 96, 96), (1, 12, 12), (0, 0, 0), 4, batch=16),
    "swinunetr": WindowCase((48, 48, 48), (7, 7, 7), (0, 0, 0), 3, head_dim=16, batch=2),
}
# Padded, shifted, clipped and odd all at once, in milliseconds: what the tests run.
SMOKE_CASES = {"smoke": WindowCase((5, 9, 4), (2, 7, 7), (1, 3, 3), 2, head_dim=20, batch=2)}


@dataclass(frozen=True)
class DividedCase:
    """One call of ``temporal_attention``, ``spatial_attention`` or ``factorized_dot_product_attention``."""

    kind: str  # "temporal" | "spatial" | "factorized"
    num_frames: int
    num_sites: int
    token_order: str = "hwt"
    has_cls: bool = False  # averaged over the frames
    heads: int = 12
    head_dim: int = 64
    batch: int = 1

    @property
    def temporal_heads(self) -> int:
        return {"temporal": self.heads, "factorized": self.heads // 2}.get(self.kind, 0)

    @property
    def qkv_shape(self) -> tuple[int, ...]:
        return (self.batch, self.num_frames * self.num_sites + self.has_cls, 3, self.heads, self.head_dim)

    def flops(self, direction: str) -> int:
        """Operations of the matrix products: two forward; five backward, the recomputed scores included."""
        products = {"forward": 2, "forward_backward": 7}[direction]
        over_time = self.num_sites * self.num_frames**2
        over_space = self.num_frames * (self.num_sites + self.has_cls) ** 2
        scores = self.temporal_heads * over_time + (self.heads - self.temporal_heads) * over_space
        return products * 2 * self.batch * scores * self.head_dim

    def bytes_moved(self, direction: str, dtype: torch.dtype) -> int:
        """Bytes that must cross memory at least: each input read once, each result written once."""
        token_bytes = math.prod(self.qkv_shape[:2]) * self.heads * self.head_dim * dtype.itemsize
        forward = 4 * token_bytes  # q, k, v in, context out
        backward = 7 * token_bytes  # q, k, v and the context's gradient in, three gradients out
        return forward if direction == "forward" else forward + backward


# TimeSformer-B (8 frames), -L (96 frames) and one of 32 frames on 224 x 224 video; ViViT-B with tubelets of 2 frames.
DIVIDED_CASES = {
    "temporal_8_frames": DividedCase("temporal", 8, 196, batch=2),
    "temporal_32_frames": DividedCase("temporal", 32, 196),
    "temporal_96_frames": DividedCase("temporal", 96, 196),
    "spatial_cls_8_frames": DividedCase("spatial", 8, 196, has_cls=True, batch=2),
    "factorized_vivit_b": DividedCase("factorized", 16, 196, "thw"),
}
# What a GPU is given: batches of eight clips of the published models, whose token orders differ.
GPU_DIVIDED_CASES = {
    name: replace(case, batch=8)
    for name, case in {
        "timesformer_b_time": DividedCase("temporal", 8, 196),
        "timesformer_b_space": DividedCase("spatial", 8, 196, has_cls=True),
        "timesformer_hr_time": DividedCase("temporal", 16, 784),
        "timesformer_hr_space": DividedCase("spatial", 16, 784, has_cls=True),
        "timesformer_32_frames_time": DividedCase("temporal", 32, 196),
        "timesformer_l_time": DividedCase("temporal", 96, 196),
        "timesformer_l_space": DividedCase("spatial", 96, 196, has_cls=True),
        "vivit_b_model3_time": DividedCase("temporal", 16, 196, "thw"),
        "vivit_b_model3_space": DividedCase("spatial", 16, 196, "thw"),
        "vivit_b_model4": DividedCase("factorized", 16, 196, "thw"),
    }.items()
}
SMOKE_DIVIDED_CASES = {
    "smoke_temporal": DividedCase("temporal", 5, 6, heads=2, head_dim=20, batch=2),
    "smoke_spatial": DividedCase("spatial", 3, 7, "thw", True, heads=2, head_dim=20, batch=2),
    "smoke_factorized": DividedCase("factorized", 3, 7, "thw", heads=2, head_dim=20, batch=2),
}


@dataclass(frozen=True)
class MixingCase:
    """One call of ``space_time_mixing_attention``, or of ``temporal_shift`` on as many tokens."""

    shift_div: int
    num_frames: int = 16
    num_tokens: int = 197
    heads: int = 12
    head_dim: int = 64
    clips: int = 1

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def channel_shifts(self) -> list[tuple[int, int, int]]:
        fold = self.channels // self.shift_div
        return [(0, fold, 1), (fold, 2 * fold, -1)]

    @property
    def qkv_shape(self) -> tuple[int, ...]:
        return (self.clips * self.num_frames, self.num_tokens, 3, self.heads, self.head_dim)

    def flops(self, direction: str) -> int:
        """Operations of the matrix products: two forward; five backward, the recomputed scores included."""
        products = {"forward": 2, "forward_backward": 7}[direction]
        return products * 2 * self.qkv_shape[0] * self.heads * self.num_tokens**2 * self.head_dim

    def bytes_moved(self, direction: str, dtype: torch.dtype) -> int:
        """Bytes that must cross memory at least: each input read once, each result written once."""
        passes = {"forward": 4, "forward_backward": 4 + 7}[direction]
        return passes * math.prod(self.qkv_shape[:2]) * self.channels * dtype.itemsize


# X-ViT-B on 224 x 224 video: 16 frames, as in its Kinetics models (8) and in those of Something-Something (4).
MIXING_CASES = {"xvit_b_div8": MixingCase(8), "xvit_b_div4": MixingCase(4)}
# What a GPU is given: eight clips of 16 frames, and of 8.
GPU_MIXING_CASES = {
    f"xvit_b_{frames}_frames_div{shift_div}": MixingCase(shift_div, frames, clips=8)
    for frames in (16, 8)
    for shift_div in (8, 4)
}
SMOKE_MIXING_CASES = {"smoke": MixingCase(3, num_frames=4, num_tokens=7, heads=3, head_dim=20, clips=2)}


@dataclass(frozen=True)
class ModelCase:
    """A whole model on one video, or volume, (batch, channels, frames, height, width).

    Attributes:
        model: its name.
        video_shape: size of the video.
        overrides: arguments of its constructor.
        exact: dtype of the run that outputs are compared with.
    """

    model: str
    video_shape: tuple[int, int, int, int, int]
    overrides: tuple[tuple[str, object], ...] = ()
    exact: str = "float64"


MODEL_CASES = {
    # The first half of the model, because compiling all of it takes a minute.
    "video_swin_t_half_16x112x112": ModelCase(
        "video_swin_t", (1, 3, 16, 112, 112), (("depths", (2, 2)), ("num_heads", (3, 6)))
    ),
    "video_swin_t_32x224x224": ModelCase("video_swin_t", (1, 3, 32, 224, 224)),
    "timesformer_b_8x224x224": ModelCase("timesformer_base", (1, 3, 8, 224, 224)),
    "vivit_b_model3_32x224x224": ModelCase("vivit_b_factorized_self_attention", (1, 3, 32, 224, 224)),
    "xvit_b_16x224x224": ModelCase("xvit_b16_16f", (1, 3, 16, 224, 224)),
    # Of other libraries, see benchmarks/libraries.py.
    "torchvision_swin3d_t_32x224x224": ModelCase("torchvision_swin3d_t", (1, 3, 32, 224, 224)),
    # In float64 torch unfolds the inputs of 3D convolutions, for which 24 GB are not enough.
    "monai_swin_unetr_96x96x96": ModelCase("monai_swin_unetr", (1, 1, 96, 96, 96), exact="float32"),
    "transformers_timesformer_b_8x224x224": ModelCase("transformers_timesformer", (1, 3, 8, 224, 224)),
}
SMOKE_MODEL_CASES = {
    "smoke": ModelCase(
        "video_swin_t",
        (1, 3, 8, 32, 40),
        (("embed_dim", 16), ("depths", (2, 2)), ("num_heads", (2, 4)), ("num_classes", 7)),
    )
}

# What runs when nobody asks for more: each family and each kind of work once.
DEFAULT_CASES = (
    ("swin_t_stage1_shifted", "forward"),
    ("swin_t_stage1_shifted", "forward_backward"),
    ("swin_t_stage3", "forward"),
    ("swinunetr_stage1_shifted", "forward"),
    ("temporal_8_frames", "forward"),
    ("temporal_32_frames", "forward"),
    ("spatial_cls_8_frames", "forward"),
    ("xvit_b_div8", "forward"),
    ("video_swin_t_half_16x112x112", "inference"),
)
# What the cases, directions and contenders are called in tables; what is not here is called by its name.
TITLES = {
    **{f"swin_t_stage{stage}": f"Swin-T stage {stage}" for stage in range(1, 5)},
    **{f"swin_t_stage{stage}_shifted": f"Swin-T stage {stage}, shifted" for stage in range(1, 5)},
    "swin_b_ssv2_stage1_shifted": "Swin-B (SSv2) stage 1, shifted",
    "swin_b_ssv2_stage3": "Swin-B (SSv2) stage 3",
    "padded_stage1_shifted": "Swin-T stage 1, shifted, padded",
    "swinunetr_stage1_shifted": "SwinUNETR stage 1, shifted",
    "temporal_8_frames": "TimeSformer time, 8 frames, batch 2",
    "temporal_32_frames": "TimeSformer time, 32 frames",
    "temporal_96_frames": "TimeSformer time, 96 frames",
    "spatial_cls_8_frames": "TimeSformer space, 8 frames, batch 2",
    "factorized_vivit_b": "ViViT half time, half space, 16 frames",
    "xvit_b_div8": "X-ViT, an eighth each way",
    "xvit_b_div4": "X-ViT, a quarter each way",
    "video_swin_t_half_16x112x112": "Video Swin-T, stages 1 and 2, 16 x 112 x 112",
    "video_swin_t_32x224x224": "Video Swin-T, 32 x 224 x 224",
    "timesformer_b_8x224x224": "TimeSformer-B, 8 x 224 x 224",
    "vivit_b_model3_32x224x224": "ViViT-B model 3, 32 x 224 x 224",
    "xvit_b_16x224x224": "X-ViT-B, 16 x 224 x 224",
    "forward_backward": "forward + backward",
    "shift": "shift alone",
    "training": "training step",
    "torchvision_swin3d_t_32x224x224": "torchvision swin3d_t, 32 x 224 x 224",
    "monai_swin_unetr_96x96x96": "MONAI SwinUNETR 48, 96 x 96 x 96",
    "transformers_timesformer_b_8x224x224": "transformers TimeSformer-B, 8 x 224 x 224",
    "sdpa": "SDPA",
    "sdpa_prebuilt": "SDPA, mask prebuilt",
    "vidattn_compiled": "vidattn + compile",
    "vidattn_float32": "vidattn, float32",
}
