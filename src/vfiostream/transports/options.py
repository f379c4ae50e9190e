"""What can be asked for about a transport, whatever its scheme."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vfiostream.errors import UsageError


@dataclass(frozen=True, slots=True)
class Options:
    """Each has a default that asks for nothing."""

    replace: bool = False
    """A file that exists may be replaced when the new one is finished."""

    timeout: float | None = None
    """Seconds that opening may take; None for as long as the system tries. A limit around the context would end it."""

    def only(self, address: str, *names: str) -> None:
        """Raise :class:`~vfiostream.errors.UsageError` where something is asked for that is not among ``names``: what a
        scheme does not know must not be ignored.
        """
        for field in fields(self):
            if field.name not in ("timeout", *names) and getattr(self, field.name) != field.default:
                raise UsageError(f"{address}: such an address has no {field.name}; leave that away")
