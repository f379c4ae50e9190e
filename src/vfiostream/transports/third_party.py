"""Transports that other distributions bring, by an entry point of the group ``vfiostream.transports``.

An entry point is named after its scheme, and its value is a module with ``connect`` and ``listen`` (or an object with
both). It is loaded when an address names it, and no sooner. The names of our own transports can't be taken.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from vfiostream.errors import TransportError

GROUP = "vfiostream.transports"

logger = logging.getLogger("vfiostream.transport")


def installed(ours: Collection[str]) -> dict[str, list[EntryPoint]]:
    """The entry points there are, by scheme, but for those that are named as ``ours`` are."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        if point.name in ours:
            logger.warning("%s brings a transport %s:, which stays our own", _origin(point), point.name)
        else:
            found.setdefault(point.name, []).append(point)
    return found


def load(scheme: str, points: list[EntryPoint]) -> Any:
    """The module that ``points``, of which there must be one, stand for; raises
    :class:`~vfiostream.errors.TransportError`.
    """
    if len(points) > 1:
        names = " and ".join(sorted(map(_origin, points)))
        raise TransportError(f"{scheme}: is brought by {names}, and one has to be chosen; uninstall the others")
    (point,) = points
    try:
        module = point.load()
    except Exception as error:
        raise TransportError(
            f"the transport {scheme}: of {_origin(point)} can't be loaded ({type(error).__name__}: {error}); ask its "
            "author, or uninstall it"
        ) from error
    missing = [name for name in ("connect", "listen") if not callable(getattr(module, name, None))]
    if missing:
        raise TransportError(
            f"the transport {scheme}: of {_origin(point)} has no {' and no '.join(missing)}; ask its author"
        )
    logger.debug("%s: is of %s", scheme, _origin(point))
    return module


def _origin(point: EntryPoint) -> str:
    """The distribution that brings it."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"
