"""Transports by address: ``tcp:HOST:PORT``, ``unix:PATH``, ``file:PATH``, and whatever other distributions bring.

The module of a scheme is imported when an address names it, so nobody pays for a transport he does not use. Such a
module has ``connect(address, options)`` and ``listen(address, options)``, both async context managers, which get the
whole address and check its rest.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, cast

from vfiostream.errors import UsageError
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.options import Options

_SCHEMES = {
    "tcp": ("tcp:HOST:PORT", "vfiostream.transports.stream"),
    "unix": ("unix:PATH", "vfiostream.transports.stream"),
    "file": ("file:PATH", "vfiostream.transports.file"),
    "exec": ("exec:COMMAND", "vfiostream.transports.program"),
    "fd": ("fd:N", "vfiostream.transports.inherited"),
    "stdio": ("stdio:", "vfiostream.transports.inherited"),
    "systemd": ("systemd:", "vfiostream.transports.inherited"),
}
_ONE_WAY = frozenset({"file", "exec", "fd", "stdio"})
"""Those of ours that a checkpoint can go to."""


class _SchemeModule(Protocol):
    def connect(self, address: str, options: Options) -> AbstractAsyncContextManager[Transport]: ...

    def listen(self, address: str, options: Options) -> AbstractAsyncContextManager[Listener]: ...


def _module_of(address: str) -> _SchemeModule:
    """The module of a scheme of ours, or of somebody else's."""
    scheme, colon, rest = address.partition(":")
    if scheme in _SCHEMES and "\0" not in rest and (rest or _SCHEMES[scheme][0] == address):
        return cast(_SchemeModule, importlib.import_module(_SCHEMES[scheme][1]))
    from vfiostream.transports import third_party  # with what reads all installed metadata

    others = third_party.installed(_SCHEMES)
    if colon and "\0" not in rest and scheme in others:
        return cast(_SchemeModule, third_party.load(scheme, others[scheme]))
    known = ", ".join([*(form for form, _ in _SCHEMES.values()), *(f"{name}:" for name in sorted(others))])
    raise UsageError(f"{address!r} is not an address; write one of {known}")


def check(address: str, *, answers: bool) -> None:
    """Raise what :func:`connect` would for ``address``, as far as its scheme says: where there is no such, or it is one
    of ours that does not go the way that is wanted (:attr:`Options.answers`). Opens nothing.
    """
    _module_of(address)
    scheme = address.partition(":")[0]
    if scheme in _SCHEMES and scheme not in _ONE_WAY:
        Options(answers=answers).only(address)


@asynccontextmanager
async def connect(address: str, options: Options | None = None) -> AsyncIterator[Transport]:
    """Open ``address`` to send to it; closed when the context ends.

    Raises :class:`~vfiostream.errors.UsageError` for what is not an address, or has not what ``options`` ask for, and
    :class:`~vfiostream.errors.TransportError` when it can't be opened.
    """
    async with _module_of(address).connect(address, options or Options()) as transport:
        yield transport


@asynccontextmanager
async def listen(address: str, options: Options | None = None) -> AsyncIterator[Listener]:
    """Open ``address`` to receive from it; raises as :func:`connect` does. A file is opened by ``accept``. What was
    accepted lives until it is closed, and no longer than the context.
    """
    async with _module_of(address).listen(address, options or Options()) as listener:
        yield listener
