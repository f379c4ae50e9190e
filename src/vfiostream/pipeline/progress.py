"""What a migration tells of itself while it runs, and at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vfiostream.pipeline.adaptive import Statistics

Phase = Literal["connecting", "precopy", "stop-and-copy", "switchover", "finishing", "done"]


@dataclass(slots=True)
class Progress:
    """How far a migration is. The pipeline writes it, anybody may read it at any time; nothing is ever taken back."""

    phase: Phase = "connecting"
    round: int = 0
    """The round that is under way, or was last; 0 before the first."""
    content: int = 0
    """Bytes of device memory, guest memory and config that were sent, or loaded."""
    transferred: int = 0
    """Bytes that went over the link or into the file, or came from there."""
    round_content: int = 0
    """Bytes of content of this round so far."""
    pending: int | None = None
    """Bytes still to be sent, estimated at the end of the last round; None before."""
    dirty_rate: float | None = None
    """Bytes a second, as the last round found; None before the second round."""
    throughput: float | None = None
    """Bytes of content a second, of the last round; None before."""
    expected_downtime: float | None = None
    """Seconds, estimated at the end of the last round; None before."""


class Downtime(NamedTuple):
    """Where the time went in which neither device ran, in seconds; the phases follow each other without a gap."""

    pause: float
    """Pausing the guest."""
    stop: float
    """Stopping the devices."""
    memory: float
    """Collecting and sending what was still dirty."""
    config: float
    """Collecting and sending PCI config space and config."""
    load: float
    """Until the target had loaded and checked everything. 0 for a checkpoint."""
    start: float
    """From the commit until the target ran; for a checkpoint, until the source ran on."""

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True, slots=True)
class Summary:
    """How a migration, a save or a restore ended: well."""

    rounds: int
    """Including the last, with the device stopped."""
    content: int
    """Bytes of device memory, guest memory and config."""
    transferred: int
    """Bytes on the link or in the file."""
    seconds: float
    """From the start of the session to the target's word that it runs; for a file, until it was durable."""
    downtime: Downtime
    """On the target's side what it sees of it, from the source's word that it is stopped: ``pause`` and ``stop`` are
    0, and ``start`` begins when everything is loaded.
    """
    peak_buffers: int
    """Most bytes that were held of the byte budget."""
    warnings: tuple[str, ...] = field(default=())
    compression: Statistics | None = None
    """What was compressed, and how; None on the target."""

    @property
    def throughput(self) -> float:
        """Bytes of content a second, over all."""
        return self.content / self.seconds if self.seconds else 0.0
