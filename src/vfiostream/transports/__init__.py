"""Transports by address, ``tcp:HOST:PORT`` for example: ours, and those that other distributions bring.

The module of a scheme is imported when an address names it, so nobody pays for a transport he does not use. Such a
module has ``connect(address, options)`` and ``listen(address, options)``, both async context managers, which get the
whole address and check its rest, and ``OPTIONS``, the names of the options it knows.
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
    "tls": ("tls:HOST:PORT", "vfiostream.transports.tls"),
    "quic": ("quic:HOST:PORT", "vfiostream.transports.quic"),
    "unix": ("unix:PATH", "vfiostream.transports.stream"),
    "file": ("file:PATH", "vfiostream.transports.file"),
    "exec": ("exec:COMMAND", "vfiostream.transports.program"),
    "fd": ("fd:N", "vfiostream.transports.inherited"),
    "stdio": ("stdio:", "vfiostream.transports.inherited"),
    "systemd": ("systemd:", "vfiostream.transports.inherited"),
}


class _SchemeModule(Protocol):
    OPTIONS: frozenset[str]

    def connect(self, address: str, options: Options) -> AbstractAsyncContextManager[Transport]: ...

    def listen(self, address: str, options: Options) -> AbstractAsyncContextManager[Listener]: ...


def missing(error: ModuleNotFoundError, what: str, extra: str) -> UsageError:
    """What to raise where ``what`` needs a package that comes with an ``extra`` only."""
    return UsageError(f"{what}: this needs {error.name}, which is not installed; install vfiostream[{extra}]")


def _module_of(address: str, options: Options) -> _SchemeModule:
    scheme, colon, rest = address.partition(":")
    whole = colon and "\0" not in address
    if whole and scheme in _SCHEMES and (rest or _SCHEMES[scheme][0] == address):
        try:
            module = importlib.import_module(_SCHEMES[scheme][1])
        except ModuleNotFoundError as error:
            raise missing(error, address, scheme) from error
    else:
        from vfiostream.transports import third_party  # with what reads the metadata of all that is installed

        others = third_party.installed(_SCHEMES)
        if not whole or scheme not in others:
            known = ", ".join([*(form for form, _ in _SCHEMES.values()), *(f"{name}:" for name in sorted(others))])
            raise UsageError(f"{address!r} is not an address; write one of {known}")
        module = third_party.load(scheme, others[scheme])
    options.only(address, *getattr(module, "OPTIONS", ()))
    return cast(_SchemeModule, module)


def check(address: str, options: Options) -> None:
    """Raise what :func:`connect` and :func:`listen` raise of a scheme that is not there, or that has not what
    ``options`` ask for. Opens nothing.
    """
    _module_of(address, options)


@asynccontextmanager
async def connect(address: str, options: Options | None = None) -> AsyncIterator[Transport]:
    """Open ``address`` to send to it; closed when the context ends.

    Raises :class:`~vfiostream.errors.UsageError` for what is not an address, or has not what ``options`` ask for, and
    :class:`~vfiostream.errors.TransportError` when it can't be opened.
    """
    options = options or Options()
    async with _module_of(address, options).connect(address, options) as transport:
        yield transport


@asynccontextmanager
async def listen(address: str, options: Options | None = None) -> AsyncIterator[Listener]:
    """Open ``address`` to receive from it; raises as :func:`connect` does. A file is opened by ``accept``. What was
    accepted lives until it is closed, and no longer than the context.
    """
    options = options or Options()
    async with _module_of(address, options).listen(address, options) as listener:
        yield listener
