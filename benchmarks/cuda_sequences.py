"""Audits the kernels of csrc/cuda whose groups are sequences: attention over time and over space, and mixing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks import cubins
from benchmarks.audited import CudaLaunchAudit
from benchmarks.cuda_audit import ELEMENTS, SHARED_LIMITS, ForwardShape, audit_forward_launch
from benchmarks.prediction import Rates
from benchmarks.shapes import DividedCase, MixingCase

_FIELDS = ("dim", "threads", "splits", "block_keys", "resident", "shared_bytes")
_FORWARD = "const auto p = plan_sequence_forward(n[0], n[1], n[2], n[3]);"


@dataclass(frozen=True)
class Sequences:
    """Those that a launch is for."""

    keys: int
    groups: int  # sequences times heads
    head_dim: int
    share: float  # of the bytes of the case


def sequences_of(case: DividedCase | MixingCase) -> list[Sequences]:
    """Give those of a case: over time, then over space."""
    if isinstance(case, MixingCase):
        return [Sequences(case.num_tokens, case.qkv_shape[0] * case.heads, case.head_dim, 1.0)]
    found = []
    for heads, keys, groups in (
        (case.temporal_heads, case.num_frames, case.num_sites),
        (case.heads - case.temporal_heads, case.num_sites + case.has_cls, case.num_frames),
    ):
        if heads:
            found.append(Sequences(keys, case.batch * groups * heads, case.head_dim, heads / case.heads))
    return found


def audit_forward(
    case: DividedCase | MixingCase, of: Sequences, dtype: torch.dtype, arch: str, rates: Rates
) -> CudaLaunchAudit:
    """Audit the launch of a forward pass for some sequences of a case."""
    plan = cubins.planner("plan_sequence_forward", _FORWARD, _FIELDS)(
        of.keys, of.head_dim, of.groups, SHARED_LIMITS[arch]
    )
    name = "sequence_forward" if plan["resident"] else "streamed_sequence_forward", ELEMENTS[dtype], plan["dim"]
    moved = of.share * case.bytes_moved("forward", dtype) + 4 * of.groups * of.keys
    return audit_forward_launch(name, plan, ForwardShape(of.keys, of.groups, moved), arch, rates)
