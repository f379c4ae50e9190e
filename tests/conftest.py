"""Fixtures that all tests share: every asynchronous test runs on asyncio, uvloop and trio."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # How long an example takes says nothing here.
settings.load_profile("untimed")

KERNEL_TESTS = Path(__file__).parent / "kernel"

for suite in ("access_contract", "between", "device_contract", "movers", "interference"):
    pytest.register_assert_rewrite(f"tests.{suite}")
pytest.register_assert_rewrite("vfiostream.testing")


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A command that ran in this process has set the level of its log: what comes after it is to log as before."""
    logger = logging.getLogger("vfiostream")
    level = logger.level
    yield
    logger.setLevel(level)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say once that there is more, where the tests in ``tests/kernel`` would have run."""
    if os.environ.get("VFIOSTREAM_IN_KERNEL") == "1":
        return
    asked_for = [(config.invocation_params.dir / arg.partition("::")[0]).resolve() for arg in config.args]
    if any(path in (KERNEL_TESTS, *KERNEL_TESTS.parents, *KERNEL_TESTS.iterdir()) for path in asked_for):
        terminalreporter.write_line("tests/kernel runs inside a kernel of its own: scripts/test-kernel")
