"""The conformance rules held against real drivers: the kernel's own sample, and our four-region driver."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import pytest

from tests.kernel.conftest import MakeMdev
from tests.kernel.mdev import Mdev
from vfiostream.access import open_access
from vfiostream.conformance.rules import Verdict
from vfiostream.conformance.run import Report, run

pytestmark = pytest.mark.anyio
TIMEOUT = 20.0

Address: TypeAlias = Callable[[Mdev], str]


def by_group(mdev: Mdev) -> str:
    return f"vfio:{mdev.group.name}/{mdev.uuid}"


def by_node(mdev: Mdev) -> str:
    return f"vfio:{mdev.cdev}"


def verdicts(report: Report, verdict: Verdict) -> dict[str, str]:
    return {one.rule.id: one.detail for one in report.outcomes if one.verdict is verdict}


MTTY = {
    # The known one: 0, where the header wants ENOMSG.
    "precopy-end": "in PRE_COPY, a read returned 0 after 24 bytes; in PRE_COPY_P2P, a read returned 0 after 24 bytes",
    # It resets all the same when it is told to.
    "reset-told": "its flags do not have VFIO_DEVICE_FLAGS_RESET",
    # It looks at the header as it is written, says EFAULT, and takes note of the bytes all the same.
    "stream-refused": "a stream with other first bytes was refused when it was written, with EFAULT, and then the load "
    "ended well",
    # Its log is three functions that return 0.
    "log-twice": "a second start was taken",
    "log-off": "a report before the start was answered; a report after the stop was answered",
}
"""The rules that the kernel's sample breaks (Linux 6.12), and what is seen of that."""
DOES_NO_DMA = {"stopped-still", "log-complete", "log-clears"}


@pytest.mark.parametrize(
    ("address", "with_target"), [(by_group, True), (by_node, False)], ids=["group, target", "node, itself"]
)
async def test_what_the_kernels_sample_breaks(mdev: MakeMdev, address: Address, *, with_target: bool) -> None:
    one = partial(open_access, address(mdev("mtty-2")), timeout=TIMEOUT)
    other = partial(open_access, address(mdev("mtty-2")), timeout=TIMEOUT) if with_target else None
    report = await run(one, other)
    assert report.interface == "migration-states"
    assert verdicts(report, Verdict.BROKEN) == MTTY
    assert set(verdicts(report, Verdict.NOT_TESTABLE)) == DOES_NO_DMA
    assert verdicts(report, Verdict.SKIPPED) == {}


NO_MEMORY = {
    "size-captures",
    "unfetched-kept",
    "chunk-positions",
    "load-too-large",
    "load-positions",
    "load-short",
}
NO_TRACKING = {"bitmap-forms", "bitmap-too-large", "bitmap-empty", "bitmap-complete", "bitmap-clears"}


class TestOurDriver:
    """On one event loop: a run is long in there, and what differs is the driver."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.mark.parametrize(
        ("type_name", "address", "not_testable"),
        [
            ("four-region-16M", by_group, set()),
            ("four-region-16M-sparse", by_node, set()),
            ("four-region-16M-nomap", by_group, set()),
            ("four-region-16M-packed", by_node, set()),
            ("four-region-16M-untracked", by_group, NO_TRACKING),
            ("four-region-0M", by_node, NO_MEMORY),
        ],
    )
    async def test_our_driver_keeps_all_rules(
        self, mdev: MakeMdev, address: Address, type_name: str, not_testable: set[str]
    ) -> None:
        """Its doorbell has it write guest memory, so what it tells of dirty pages is held against what it wrote."""
        report = await run(partial(open_access, address(mdev(type_name)), timeout=TIMEOUT))
        assert report.interface == "four-region"
        assert verdicts(report, Verdict.BROKEN) == {}
        assert set(verdicts(report, Verdict.NOT_TESTABLE)) == not_testable
        assert verdicts(report, Verdict.SKIPPED) == {}
        assert verdicts(report, Verdict.KEPT).get("bitmap-complete", "17 pages were written and told") == (
            "17 pages were written and told"
        )
