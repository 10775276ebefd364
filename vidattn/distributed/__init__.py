"""Models and ops on several processes, with the engine of ``torch.distributed``."""

from vidattn.distributed import rules  # noqa: F401  (importing it registers them)
from vidattn.distributed.frames import ShardedClip, shard_frames
from vidattn.distributed.plan import parallelize_plan

__all__ = ["ShardedClip", "parallelize_plan", "shard_frames"]
