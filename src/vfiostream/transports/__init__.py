"""Transports by address: ``tcp:HOST:PORT``, ``unix:PATH``, ``file:PATH``.

The module of a scheme is imported when an address names it, so nobody pays for a transport he does not use. Such a
module has ``connect(address, *, replace)`` and ``listen(address)``, which get the whole address and check its rest.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from vfiostream.errors import UsageError
from vfiostream.transports.contract import Listener, Transport

_SCHEMES = {
    "tcp": ("tcp:HOST:PORT", "vfiostream.transports.stream"),
    "unix": ("unix:PATH", "vfiostream.transports.stream"),
    "file": ("file:PATH", "vfiostream.transports.file"),
}


class _SchemeModule(Protocol):
    async def connect(self, address: str, *, replace: bool) -> Transport: ...

    async def listen(self, address: str) -> Listener: ...


def _module_of(address: str) -> _SchemeModule:
    scheme, _, rest = address.partition(":")
    if scheme not in _SCHEMES or not rest or "\0" in rest:
        known = ", ".join(form for form, _ in _SCHEMES.values())
        raise UsageError(f"{address!r} is not an address; write one of {known}")
    return cast(_SchemeModule, importlib.import_module(_SCHEMES[scheme][1]))


async def connect(address: str, *, replace: bool = False) -> Transport:
    """Open ``address`` to send to it.

    ``replace`` lets a file that exists be replaced when the new one is finished; it has no meaning elsewhere. Raises
    :class:`~vfiostream.errors.UsageError` for what is not an address and
    :class:`~vfiostream.errors.TransportError` when it can't be opened.
    """
    return await _module_of(address).connect(address, replace=replace)


async def listen(address: str) -> Listener:
    """Open ``address`` to receive from it; raises as :func:`connect` does. A file is opened by ``accept``."""
    return await _module_of(address).listen(address)
