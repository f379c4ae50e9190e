"""QUIC against the suite, and what only it has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import issued, written
from tests.quic_links import linked, options_in
from tests.test_tls import CASES, Case, waiting
from tests.transport_contract import LinkContract
from vfiostream.errors import PeerRefused
from vfiostream.migrate import send
from vfiostream.transports import connect
from vfiostream.transports.options import Options

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    return options_in(tmp_path_factory.mktemp("certificates"))


class TestQuic(LinkContract):
    @pytest.fixture(autouse=True)
    def _options(self, options: Options) -> None:
        self.options = options

    def pair(self) -> Any:
        return linked(self.options)


# ---- who is believed


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_who_is_not_believed_moves_nothing(case: Case, tmp_path: Path) -> None:
    source = written(tmp_path, issued("source", **case.source), **case.source_believes)
    target = written(tmp_path, issued("target", **case.target), **case.target_believes)
    async with waiting(tmp_path, target, "quic") as (here, there):
        with pytest.raises(PeerRefused, match=f"^{there.address}: .*{case.source_says}") as caught:
            async with connect(there.address, Options(credentials=source)) as link:
                await send(here.device, link)
        assert "\n" not in str(caught.value)
        assert re.search(f"^quic:127.0.0.1:[0-9]+: .*{case.target_says}", await there.refusal())
