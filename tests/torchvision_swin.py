"""torchvision's 3D Swin, whose Python code also runs where torchvision's compiled operators do not load.

They do not load beside a CPU build of torch. The package then fails to import for want of the schemas of two of them,
which have nothing to do with Swin: these are defined here, in that case only.
"""

from __future__ import annotations

import importlib
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_NAME = "torchvision.models.video.swin_transformer"

try:
    torchvision_swin3d = importlib.import_module(_NAME)
except RuntimeError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    torchvision_swin3d = importlib.import_module(_NAME)

torchvision_swin2d = importlib.import_module("torchvision.models.swin_transformer")
SwinTransformerBlock = torchvision_swin2d.SwinTransformerBlock
