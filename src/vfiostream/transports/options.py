"""What can be asked for about a transport, whatever its scheme."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from vfiostream.errors import TransportError, UsageError
from vfiostream.transports.credentials import Credentials


@dataclass(frozen=True, slots=True)
class Options:
    """Each has a default that asks for nothing."""

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
            if field.name not in ("timeout", "refused", *names) and getattr(self, field.name) != field.default:
                raise UsageError(f"{address}: such an address has no {field.name}; leave that away")
