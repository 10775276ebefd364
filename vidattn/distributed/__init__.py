"""Models over several processes, on the engine of ``torch.distributed``."""

from vidattn.distributed.frames import ShardedClip, shard_frames

__all__ = ["ShardedClip", "shard_frames"]
