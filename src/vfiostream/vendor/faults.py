"""Making operations go wrong on purpose, at exactly the place the settings name."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable

from vfiostream.vendor.settings import Fault, Operation


class Hang(Exception):
    """The driver does not answer any more; the server keeps its client waiting until that goes away."""


class Exit(Exception):
    """The driver dies; the server ends its process at once."""


class Broken(OSError):
    """The driver can't go on, and can't get back to where it was: it refuses with EIO and is in its error state."""


class FaultPlan:
    """Counts operations and strikes at those that are to fail."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self._effects = {(fault.operation, fault.n): fault.effect for fault in faults}
        self._counts: Counter[Operation] = Counter()

    def strike(self, operation: Operation) -> None:
        """Count one ``operation``. Raises OSError, Broken, Hang or Exit where the settings want it, else nothing."""
        self._counts[operation] += 1
        effect = self._effects.get((operation, self._counts[operation]))
        match effect:
            case None:
                return
            case "hang":
                raise Hang(f"{operation} number {self._counts[operation]}")
            case "exit":
                raise Exit(f"{operation} number {self._counts[operation]}")
            case "error":
                raise Broken(errno.EIO, f"fault asked for at {operation} number {self._counts[operation]}")
            case _:
                raise OSError(effect, f"{os.strerror(effect)}: fault asked for at {operation} number "
                              f"{self._counts[operation]}")  # fmt: skip
