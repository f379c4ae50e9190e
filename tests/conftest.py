"""Fixtures that all tests share: every asynchronous test runs on asyncio, uvloop and trio."""

from __future__ import annotations

from typing import Any

import pytest

for suite in ("access_contract", "between", "device_contract", "transport_contract", "movers", "interference"):
    pytest.register_assert_rewrite(f"tests.{suite}")


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param
