"""What can be set about a migration beside the policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vfiostream.errors import UsageError
from vfiostream.pipeline.bandwidth import Bandwidth
from vfiostream.pipeline.budget import DEFAULT_BUDGET
from vfiostream.protocol import limits
from vfiostream.protocol.payload import MAX_LEVEL


@dataclass(frozen=True, slots=True)
class Settings:
    """Validated when it is made: :class:`~vfiostream.errors.UsageError`."""

    chunk: int = limits.DEFAULT_CHUNK
    """Bytes of content in one frame at most; the smaller of both ends holds."""
    budget: int = DEFAULT_BUDGET
    """Bytes that this end buffers at most."""
    compression: int | Literal["adaptive"] = 0
    """zstd level, 1 to 19; 0 sends what is there; ``"adaptive"`` finds out by itself what moves most, from chunk to
    chunk (:mod:`vfiostream.pipeline.adaptive`). Zeros cost nothing either way.
    """
    bandwidth: Bandwidth = field(default_factory=Bandwidth)
    """The limits on the link, which may be changed while the migration runs."""
    patience: float = 30.0
    """Seconds that the other end may show no progress while the source waits for it stopped, or at the switchover."""

    def __post_init__(self) -> None:
        if not limits.MIN_CHUNK <= self.chunk <= limits.MAX_CONTENT:
            raise UsageError(f"a chunk of {self.chunk} bytes can't be: {limits.MIN_CHUNK} to {limits.MAX_CONTENT} can")
        if self.compression != "adaptive" and not 0 <= self.compression <= MAX_LEVEL:
            raise UsageError(f"there is no zstd level {self.compression}: 1 to {MAX_LEVEL}, 0 for none, or adaptive")
        if not self.patience > 0:
            raise UsageError(f"a patience of {self.patience} s is none")
