"""The cases that are timed: shapes of published models, and what each costs in arithmetic and memory traffic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch

from vidattn.geometry import WindowGeometry, num_bias_rows, region_bits, resolve_windows

DIRECTIONS = ("forward", "forward_backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Products of the two matrices of a score: two forward; five backward, the recomputed scores included.
PRODUCTS = {"forward": 2, "forward_backward": 2 + 5}
# Exponentials of a score: the backward pass computes the weights again, since nothing of size N x N is kept.
EXPONENTIALS = {"forward": 1, "forward_backward": 2}


class Work(NamedTuple):
    """What a call costs at least.

    Attributes:
        flops: operations of its matrix products, those of masked scores included.
        bytes: that must cross memory; 0 where nobody has counted.
        exponentials: of the scores that no mask separates.
        visible: share of the scores that no mask separates.
    """

    flops: int
    bytes: int = 0
    exponentials: int = 0
    visible: float = 1.0


CaseT = TypeVar("CaseT")
# What the cases, directions and contenders are called in tables; what is not here is called by its name.
TITLES = {
    "forward_backward": "forward + backward",
    "shift": "shift alone",
    "training": "training step",
    "sdpa": "SDPA",
    "sdpa_prebuilt": "SDPA, mask prebuilt",
    "compiled_sdpa": "compiled SDPA",
    "vidattn_compiled": "vidattn + compile",
    "vidattn_float32": "vidattn, float32",
    "flex": "FlexAttention",
    "flash_attn": "flash-attention",
    "natten": "NATTEN",
    "xformers": "xFormers",
}
ALIASES: dict[str, list[str]] = {}  # by case: the titles of others that are the same call


def _table(*rows: tuple[str, str, CaseT]) -> dict[str, CaseT]:
    """Make a table of (name, title, case). Calls that are the same are one case, which has the first one's name."""
    table: dict[str, CaseT] = {}
    seen: dict[object, str] = {}
    for name, title, case in rows:
        call = replace(case, shift=case.geometry.shift) if isinstance(case, WindowCase) else case
        first = seen.setdefault(call, name)
        if first == name:
            table[name], TITLES[name] = case, title
        else:
            ALIASES.setdefault(first, []).append(title)
    return table


@dataclass(frozen=True)
class WindowCase:
    """One call of ``window3d_attention``: sizes in tokens, axes (depth, height, width)."""

    grid: tuple[int, int, int]
    window: tuple[int, int, int]
    shift: tuple[int, int, int]
    heads: int
    head_dim: int = 32
    batch: int = 1
    wrap: tuple[bool, bool, bool] = (False, False, False)

    @property
    def geometry(self) -> WindowGeometry:
        return resolve_windows(self.grid, self.window, self.shift, self.wrap)

    @property
    def qkv_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.grid, 3, self.heads, self.head_dim)

    @property
    def table_shape(self) -> tuple[int, int]:
        return (num_bias_rows(self.window), self.heads)

    @property
    def scores(self) -> int:
        return self.batch * self.geometry.num_windows * self.heads * self.geometry.num_tokens**2

    @property
    def visible(self) -> float:
        """Share of the scores that no mask separates."""
        windows, tokens = (Counter(bits.tolist()) for bits in region_bits(self.geometry))
        seen = 0
        for last, count in windows.items():
            regions: Counter[int] = Counter()  # of such a window: tokens that wrapped around on the same of its axes
            for wrapped, size in tokens.items():
                regions[wrapped & last] += size
            seen += count * sum(size**2 for size in regions.values())
        return seen / (self.geometry.num_windows * self.geometry.num_tokens**2)

    def flops(self, direction: str) -> int:
        """Operations of the matrix products."""
        return PRODUCTS[direction] * 2 * self.scores * self.head_dim

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


def _windows(
    name: str, title: str, *cases: WindowCase, stages: Iterable[int] = (1, 2, 3, 4)
) -> Iterator[tuple[str, str, WindowCase]]:
    """Give the rows of a model: each stage plain, and shifted by half a window."""
    for stage, case in zip(stages, cases, strict=True):
        half = tuple(extent // 2 for extent in case.window)
        yield f"{name}_stage{stage}", f"{title} stage {stage}", case
        shifted = replace(case, shift=half)  # type: ignore[arg-type]
        yield f"{name}_stage{stage}_shifted", f"{title} stage {stage}, shifted", shifted


def _swin(heads: int, depth: int, window: tuple[int, int, int] = (8, 7, 7)) -> list[WindowCase]:
    return [
        _stage(depth, size, heads << stage, shifted=False, window=window) for stage, size in enumerate((56, 28, 14, 7))
    ]


def _swin_unetr(head_dim: int) -> list[WindowCase]:
    grids = ((48 >> stage,) * 3 for stage in range(4))
    return [WindowCase(grid, (7, 7, 7), (0, 0, 0), 3 << stage, head_dim) for stage, grid in enumerate(grids)]  # type: ignore[arg-type]


def _swin_2d(size: int, window: int, heads: int, batch: int) -> list[WindowCase]:
    grids = ((1, size >> stage, size >> stage) for stage in range(4))
    return [WindowCase(g, (1, window, window), (0, 0, 0), heads << n, batch=batch) for n, g in enumerate(grids)]


# Video Swin: 32 frames of 224 x 224 make a grid 16 deep, 16 frames one of 8, which its window covers. In stage 4 the
# window covers the frame. Swin-B on Something-Something v2 has windows of 16 frames. "padded" is stage 1 on 320 x 240
# video, whose 60 x 80 tokens are no multiple of the window. SwinUNETR (arXiv 2201.01266) makes 48^3 tokens of a 96^3
# volume, which its windows of 7^3 pad to 49^3. Pangu-Weather (arXiv 2211.02556) has windows that go around the globe;
# its second level is three times as fine as this one. VRT (arXiv 2201.12288) attends in windows of 6 and 2 frames.
WINDOW_CASES = _table(
    *_windows("swin_t", "Swin-T", *_swin(3, 16)),
    *_windows("swin_s", "Swin-S", *_swin(3, 16)),
    *_windows("swin_b", "Swin-B", *_swin(4, 16)),
    *_windows("swin_l", "Swin-L", *_swin(6, 16)),
    *_windows("swin_t_16_frames", "Swin-T, 16 frames,", *_swin(3, 8)),
    *_windows("swin_s_16_frames", "Swin-S, 16 frames,", *_swin(3, 8)),
    *_windows("swin_b_16_frames", "Swin-B, 16 frames,", *_swin(4, 8)),
    *_windows("swin_l_16_frames", "Swin-L, 16 frames,", *_swin(6, 8)),
    *_windows("swin_b_ssv2", "Swin-B (SSv2)", *_swin(4, 16, (16, 7, 7))),
    ("padded_stage1_shifted", "Swin-T stage 1, shifted, padded", WindowCase((16, 60, 80), (8, 7, 7), (4, 3, 3), 3)),
    *_windows("swinunetr", "SwinUNETR", *_swin_unetr(16)),
    *_windows("swinunetr_24", "SwinUNETR, 24 features,", *_swin_unetr(8)),
    *_windows("swin_2d", "2D Swin-T, 8 images,", *_swin_2d(56, 7, 3, 8)),
    *_windows("swin_2d_window12", "2D Swin-B, window 12, 2 images,", *_swin_2d(96, 12, 4, 2)),
    *_windows(
        "pangu",
        "Pangu-like, cyclic,",
        WindowCase((8, 31, 60), (2, 6, 12), (0, 0, 0), 12, wrap=(False, False, True)),
        stages=[2],
    ),
    *_windows("vrt", "VRT, 6 frames,", WindowCase((6, 64, 64), (6, 8, 8), (0, 0, 0), 6, 20), stages=[1]),
    *_windows("vrt_2_frames", "VRT, 2 frames,", WindowCase((6, 64, 64), (2, 8, 8), (0, 0, 0), 6, 20), stages=[1]),
)
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

    @property
    def scores(self) -> int:
        over_time = self.num_sites * self.num_frames**2
        over_space = self.num_frames * (self.num_sites + self.has_cls) ** 2
        return self.batch * (self.temporal_heads * over_time + (self.heads - self.temporal_heads) * over_space)

    def flops(self, direction: str) -> int:
        """Operations of the matrix products."""
        return PRODUCTS[direction] * 2 * self.scores * self.head_dim

    def bytes_moved(self, direction: str, dtype: torch.dtype) -> int:
        """Bytes that must cross memory at least: each input read once, each result written once."""
        token_bytes = math.prod(self.qkv_shape[:2]) * self.heads * self.head_dim * dtype.itemsize
        forward = 4 * token_bytes  # q, k, v in, context out
        backward = 7 * token_bytes  # q, k, v and the context's gradient in, three gradients out
        return forward if direction == "forward" else forward + backward


CROSSOVER = (8, 16, 32, 49, 64, 144, 196, 343, 392, 784, 1152)
# TimeSformer-B (8 frames), -HR (16 frames of 448 x 448) and -L (96 frames); ViViT-B with tubelets of 2 frames, whose
# model 2 has an encoder over space and one over time, each with a cls token of its own; a layer over time of a video
# diffusion model on 64 x 64 latents (sites come first, as its code rearranges them). Sequences of other lengths, about
# 4,096 tokens in all, show where who is fastest.
DIVIDED_CASES = _table(
    ("temporal_8_frames", "TimeSformer time, 8 frames, batch 2", DividedCase("temporal", 8, 196, batch=2)),
    ("temporal_32_frames", "TimeSformer time, 32 frames", DividedCase("temporal", 32, 196)),
    ("temporal_96_frames", "TimeSformer time, 96 frames", DividedCase("temporal", 96, 196)),
    ("temporal_hr", "TimeSformer-HR time, 16 frames", DividedCase("temporal", 16, 784)),
    (
        "spatial_cls_8_frames",
        "TimeSformer space, 8 frames, batch 2",
        DividedCase("spatial", 8, 196, has_cls=True, batch=2),
    ),
    ("spatial_cls_96_frames", "TimeSformer space, 96 frames", DividedCase("spatial", 96, 196, has_cls=True)),
    ("spatial_cls_hr", "TimeSformer-HR space, 16 frames", DividedCase("spatial", 16, 784, has_cls=True)),
    ("vivit_b_model2_space", "ViViT model 2 space, 16 frames", DividedCase("spatial", 1, 197, "thw", batch=16)),
    ("vivit_b_model2_time", "ViViT model 2 time, batch 8", DividedCase("spatial", 1, 17, "thw", batch=8)),
    ("vivit_b_model3_space", "ViViT model 3 space, 16 frames", DividedCase("spatial", 16, 196, "thw")),
    ("vivit_b_model3_time", "ViViT model 3 time, 16 frames", DividedCase("temporal", 16, 196, "thw")),
    ("factorized_vivit_b", "ViViT half time, half space, 16 frames", DividedCase("factorized", 16, 196, "thw")),
    *(
        (
            f"diffusion_{frames}_frames_{heads}x{head_dim}",
            f"diffusion time, {frames} frames, {heads} x {head_dim}",
            DividedCase("temporal", frames, 4096, heads=heads, head_dim=head_dim),
        )
        for frames in (16, 25)
        for heads, head_dim in ((8, 40), (5, 64))
    ),
    *(
        (f"sequences_of_{n}", f"sequences of {n}", DividedCase("spatial", max(1, 4096 // n), n, "thw"))
        for n in CROSSOVER
    ),
)
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

    @property
    def scores(self) -> int:
        return self.qkv_shape[0] * self.heads * self.num_tokens**2

    def flops(self, direction: str) -> int:
        """Operations of the matrix products."""
        return PRODUCTS[direction] * 2 * self.scores * self.head_dim

    def bytes_moved(self, direction: str, dtype: torch.dtype) -> int:
        """Bytes that must cross memory at least: each input read once, each result written once."""
        passes = {"forward": 4, "forward_backward": 4 + 7}[direction]
        return passes * math.prod(self.qkv_shape[:2]) * self.channels * dtype.itemsize


# X-ViT-B on 224 x 224 video: 16 frames, as in its Kinetics models (8) and in those of Something-Something (4).
MIXING_CASES = _table(
    ("xvit_b_div8", "X-ViT, an eighth each way", MixingCase(8)),
    ("xvit_b_div4", "X-ViT, a quarter each way", MixingCase(4)),
    ("xvit_b_8_frames_div8", "X-ViT, 8 frames, an eighth each way", MixingCase(8, 8)),
)
# What a GPU is given: eight clips of 16 frames, and of 8.
GPU_MIXING_CASES = {
    f"xvit_b_{frames}_frames_div{shift_div}": MixingCase(shift_div, frames, clips=8)
    for frames in (16, 8)
    for shift_div in (8, 4)
}
SMOKE_MIXING_CASES = {"smoke": MixingCase(3, num_frames=4, num_tokens=7, heads=3, head_dim=20, clips=2)}


@dataclass(frozen=True)
class ModelCase:
    """A whole model on a video, a volume or images, (batch, channels, ...), or a module of it on tokens.

    Attributes:
        model: its name.
        input_shape: size of its input.
        overrides: arguments of its constructor.
        exact: dtype of the run that outputs are compared with.
        compiled_training: whether a compiled training step is measured; compiling that of a whole model takes minutes.
    """

    model: str
    input_shape: tuple[int, ...]
    overrides: tuple[tuple[str, object], ...] = ()
    exact: str = "float64"
    compiled_training: bool = False


MODEL_CASES = _table(
    (
        # The first half of the model, because compiling all of it takes a minute.
        "video_swin_t_half_16x112x112",
        "Video Swin-T, stages 1 and 2, 16 x 112 x 112",
        ModelCase("video_swin_t", (1, 3, 16, 112, 112), (("depths", (2, 2)), ("num_heads", (3, 6)))),
    ),
    ("video_swin_t_32x224x224", "Video Swin-T, 32 x 224 x 224", ModelCase("video_swin_t", (1, 3, 32, 224, 224))),
    ("timesformer_b_8x224x224", "TimeSformer-B, 8 x 224 x 224", ModelCase("timesformer_base", (1, 3, 8, 224, 224))),
    (
        "vivit_b_model3_32x224x224",
        "ViViT-B model 3, 32 x 224 x 224",
        ModelCase("vivit_b_factorized_self_attention", (1, 3, 32, 224, 224)),
    ),
    ("xvit_b_16x224x224", "X-ViT-B, 16 x 224 x 224", ModelCase("xvit_b16_16f", (1, 3, 16, 224, 224))),
    # Of other libraries, see benchmarks/libraries.py.
    (
        "torchvision_swin3d_t_32x224x224",
        "torchvision swin3d_t, 32 x 224 x 224",
        ModelCase("torchvision_swin3d_t", (1, 3, 32, 224, 224)),
    ),
    (
        "monai_swin_unetr_96x96x96",
        "MONAI SwinUNETR 48, 96 x 96 x 96",
        # In float64 torch unfolds the inputs of 3D convolutions, for which 24 GB are not enough.
        ModelCase("monai_swin_unetr", (1, 1, 96, 96, 96), exact="float32"),
    ),
    (
        "transformers_timesformer_b_8x224x224",
        "transformers TimeSformer-B, 8 x 224 x 224",
        ModelCase("transformers_timesformer", (1, 3, 8, 224, 224), compiled_training=True),
    ),
    ("timm_swin_t_8x224x224", "timm Swin-T, 8 images", ModelCase("timm_swin_t", (8, 3, 224, 224))),
)
# The attention of those libraries alone, projections and all: one module on tokens.
MODULE_CASES = _table(
    (
        "torchvision_attention",
        "torchvision attention, Swin-T stage 1, shifted",
        ModelCase("torchvision_attention", (1, 16, 56, 56, 96), compiled_training=True),
    ),
    (
        "monai_block",
        "MONAI block, SwinUNETR stage 1, shifted",
        ModelCase("monai_block", (1, 48, 48, 48, 48), compiled_training=True),
    ),
    (
        "transformers_layer",
        "transformers layer, TimeSformer-B",
        ModelCase("transformers_layer", (1, 1569, 768), compiled_training=True),
    ),
    (
        "timm_block",
        "timm block, Swin-T stage 1, shifted, 8 images",
        ModelCase("timm_block", (8, 56, 56, 96), compiled_training=True),
    ),
)
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
# What a full run measures in 16 bits, on one thread and against what is compiled too.
NAMED_CASES = (
    "swin_t_stage1",
    "swin_t_stage1_shifted",
    "swin_t_stage3",
    "swinunetr_stage1_shifted",
    "temporal_8_frames",
    "temporal_32_frames",
    "temporal_96_frames",
    "spatial_cls_8_frames",
    "factorized_vivit_b",
    "xvit_b_div8",
)


def work_of(case: WindowCase | DividedCase | MixingCase, direction: str, dtype: torch.dtype) -> Work:
    """Count what a call costs at least."""
    visible = case.visible if isinstance(case, WindowCase) else 1.0
    exponentials = EXPONENTIALS[direction] * int(case.scores * visible)
    return Work(case.flops(direction), case.bytes_moved(direction, dtype), exponentials, visible)
