"""What can be asked for about a transport, whatever its scheme."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from vfiostream.errors import TransportError, UsageError
from vfiostream.transports.credentials import Credentials

MAX_CHANNELS = 16
"""Channels of a link."""
RETURN_WITHIN = 25.0
"""Seconds that who listens waits for a link to come back: less than the patience of a migration."""
MIN_MEMORY = 1 << 20
"""Bytes that a link of several channels, or one that reconnects, needs at least."""


@dataclass(frozen=True, slots=True)
class Options:
    """Each has a default that asks for nothing. Raises :class:`~vfiostream.errors.UsageError` for what can't be."""

    replace: bool = False
    """A file that exists may be replaced when the new one is finished."""

    answers: bool = True
    """Whether somebody at the other end is to answer: a link, for ``send`` and ``receive``. If not, one direction is
    enough, for ``save`` and ``restore``, where a scheme has that; a file never answers.
    """

    timeout: float | None = None
    """Seconds that opening may take; None for as long as the system tries. A limit around the context would end it."""

    credentials: Credentials | None = None
    """Who we are and whom we believe, where a link is encrypted."""

    plain: bool = False
    """A listener that knows no one may be reached from other hosts: the network is trusted."""

    refused: Callable[[TransportError], None] | None = None
    """A listener calls it for each peer that it did not believe; it must not raise. They are logged in any case."""

    channels: int = 1
    """Connections that the link is made of, 1 to :data:`MAX_CHANNELS`. Who connects says it; who listens follows."""

    reconnect: float | None = None
    """Seconds that a link may be without a connection: it is opened anew meanwhile and goes on where it was. Who
    connects says whether; who listens follows, and gives it :data:`RETURN_WITHIN` seconds where this is None.
    """

    memory: int = 16 << 20
    """Bytes that such links may hold at this end: what a channel has still to take, and copies of what the other end
    has not acknowledged. At least :data:`MIN_MEMORY`.
    """

    silent: bool = False
    """Who listens takes whoever connects at once, as a link of one connection, though he may wait for us to speak
    first. Without it a sender is taken once his first bytes have come, which say what the link is made of.
    """

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise UsageError(f"a link of {self.channels} channels can't be: 1 to {MAX_CHANNELS} can")
        if self.reconnect is not None and not self.reconnect > 0:
            raise UsageError(f"{self.reconnect} s are no time to reconnect in: give it some, or do without")
        if self.memory < MIN_MEMORY:
            raise UsageError(f"a link can't do with {self.memory} bytes of memory: give it {MIN_MEMORY} or more")

    def only(self, address: str, *names: str) -> None:
        """Raise :class:`~vfiostream.errors.UsageError` where something is asked for that is not among ``names``: what a
        scheme does not know must not be ignored.
        """
        if not self.answers and "answers" not in names:
            raise UsageError(
                f"{address}: that is a link, which says of no checkpoint that it is kept; use send and receive, or "
                "write file:PATH, or exec:COMMAND for a program that keeps it"
            )
        for field in fields(self):
            if (
                field.name not in ("timeout", "refused", "memory", *names)
                and getattr(self, field.name) != field.default
            ):
                raise UsageError(f"{address}: such an address has no {field.name}; leave that away")
