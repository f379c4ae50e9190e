"""TLS: the suite of all transports, and who is believed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.certificates import issued, written
from tests.transport_contract import LinkContract
from vfiostream.transports import connect, listen
from vfiostream.transports.contract import Transport
from vfiostream.transports.credentials import Credentials
from vfiostream.transports.options import Options

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def connected(source: Credentials, target: Credentials) -> AsyncIterator[tuple[Transport, Transport]]:
    async with listen("tls:127.0.0.1:0", Options(credentials=target)) as listener:
        async with connect(listener.address, Options(credentials=source)) as sender:
            yield sender, await listener.accept()


class TestTlsByCa(LinkContract):
    def pair(self) -> Any:
        return connected(written(self.folder, issued("source")), written(self.folder, issued("target")))


class TestTlsByFingerprint(LinkContract):
    def pair(self) -> Any:
        source, target = issued("source", ca=1), issued("target", ca=2)
        return connected(
            written(self.folder, source, None, peer_fingerprints=(target.fingerprint,)),
            written(self.folder, target, None, peer_fingerprints=(source.fingerprint.upper(),)),
        )
