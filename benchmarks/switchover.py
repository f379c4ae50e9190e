"""What the switchover adds to the downtime, and how much of a slow driver's time is hidden behind the link."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.moving import End, move
from benchmarks.network import REGIONS, served
from benchmarks.pairs import column, in_turn
from benchmarks.plan import MIB, CannotRun, Plan
from benchmarks.row import Row
from vfiostream.vendor.settings import Settings as DeviceSettings

LAST_ROUND = 16 * MIB


def downtime(plan: Plan) -> Iterator[Row]:
    """A guest that is found to have written exactly 16 MiB when it is stopped. The link's rate is that of the same
    migration's first round. The device is in the process and its settings give it no times of its own.
    """
    source = End("send", guest=plan.size, last_round=LAST_ROUND, settings={"chunk": plan.chunk})
    beyond, whole = [], []
    for results in plan.rounds({"ours": lambda: move(source)}):
        sent = results["ours"].sent
        if sent["content"] < plan.size + LAST_ROUND:
            raise CannotRun(f"the last round had less than {LAST_ROUND} bytes: the guest reports dirty pages otherwise")
        whole.append(1e3 * sent["downtime"])
        beyond.append(1e3 * (sent["downtime"] - LAST_ROUND / sent["first_round"]))
    yield Row(
        "downtime beyond last bytes / link rate + the device's own times, last round of 16 MiB",
        "",
        10.0,
        "most",
        "ms",
        tuple(beyond),
        tuple(whole),
        note="ours is the whole downtime, as the source sees it",
    )


def overlap(plan: Plan) -> Iterator[Row]:
    """The source's driver takes as long for all its chunks as the whole migration takes without that: 2 is as good as
    it can be (one wholly behind the other), 1 is one after the other.
    """
    if not hasattr(DeviceSettings(), "chunk_time"):
        raise CannotRun("the reference device can't take its time for a chunk: it needs the setting chunk_time")
    chunks = -(-plan.size // REGIONS[0])
    (plain,) = in_turn({"ours": lambda: served(plan).seconds}, 1, warm_up=not plan.quick)
    chunk_time = round(plain["ours"] / chunks, 4)
    rounds = in_turn(
        {
            "slow driver": lambda: served(plan, "--chunk-time", f"{1e3 * chunk_time:g}ms").speed,
            "quick driver": lambda: served(plan).speed,
        },
        plan.pairs,
        warm_up=False,
    )
    slow = tuple(column(rounds, "slow driver"))
    # What it would be if nothing moved while the driver takes its time.
    apart = tuple(
        plan.size / (plan.size / speed + chunk_time * chunks * 1e9) for speed in column(rounds, "quick driver")
    )
    yield Row(
        "a driver that takes its time for each chunk, devices in processes of their own",
        "the driver's time, then the move",
        None,
        "least",
        "GB/s",
        tuple(one / two for one, two in zip(slow, apart, strict=True)),
        slow,
        apart,
        note=f"{1e3 * chunk_time:.1f} ms for each of {chunks} chunks of 16 MiB; 2 is one wholly behind the other",
    )


MEASUREMENTS = (downtime, overlap)
