"""The migration states of the reference device: which changes there are, what is pending, features and faults."""

from __future__ import annotations

import errno
import itertools
import os
import struct
import threading

import pytest

from tests.vendor_operations import PAGE, guest, refused
from tests.vendor_states import (
    ERROR,
    GET,
    PRE_COPY,
    PRE_COPY_P2P,
    PROBE,
    RESUMING,
    RUNNING,
    RUNNING_P2P,
    SET,
    STOP,
    STOP_COPY,
    machine,
)
from vfiostream.uapi.vfio import Feature, MigrationFlags, MigrationState
from vfiostream.vendor.settings import OPERATIONS, STATES, Operation, parse_fault
from vfiostream.vendor.states import ARCS, path

States = tuple[str, ...]
PLAIN: States = ("stop-copy",)
WITHOUT_P2P: States = ("stop-copy", "pre-copy")
ALL: States = ("stop-copy", "p2p", "pre-copy")

NEXT = {
    STOP: {
        RUNNING: RUNNING_P2P, STOP_COPY: STOP_COPY, RESUMING: RESUMING, RUNNING_P2P: RUNNING_P2P,
        PRE_COPY: RUNNING_P2P, PRE_COPY_P2P: RUNNING_P2P,
    },
    RUNNING: {
        STOP: RUNNING_P2P, STOP_COPY: RUNNING_P2P, RESUMING: RUNNING_P2P, RUNNING_P2P: RUNNING_P2P,
        PRE_COPY: PRE_COPY, PRE_COPY_P2P: RUNNING_P2P,
    },
    STOP_COPY: {
        STOP: STOP, RUNNING: STOP, RESUMING: STOP, RUNNING_P2P: STOP, PRE_COPY: ERROR, PRE_COPY_P2P: ERROR,
    },
    RESUMING: {
        STOP: STOP, RUNNING: STOP, STOP_COPY: STOP, RUNNING_P2P: STOP, PRE_COPY: STOP, PRE_COPY_P2P: STOP,
    },
    RUNNING_P2P: {
        STOP: STOP, RUNNING: RUNNING, STOP_COPY: STOP, RESUMING: STOP, PRE_COPY: RUNNING,
        PRE_COPY_P2P: PRE_COPY_P2P,
    },
    PRE_COPY: {
        STOP: RUNNING, RUNNING: RUNNING, STOP_COPY: PRE_COPY_P2P, RESUMING: RUNNING, RUNNING_P2P: RUNNING,
        PRE_COPY_P2P: PRE_COPY_P2P,
    },
    PRE_COPY_P2P: {
        STOP: RUNNING_P2P, RUNNING: RUNNING_P2P, STOP_COPY: STOP_COPY, RESUMING: RUNNING_P2P,
        RUNNING_P2P: RUNNING_P2P, PRE_COPY: PRE_COPY,
    },
}  # fmt: skip
"""Which state the kernel goes to first (``vfio_mig_get_next_state`` in ``drivers/vfio/vfio_main.c``), of a driver that
has all of them; ERROR where it refuses. For other drivers it skips on from the states that they do not have.
"""
LACKING: dict[States, tuple[MigrationState, ...]] = {
    PLAIN: (RUNNING_P2P, PRE_COPY, PRE_COPY_P2P),
    ("stop-copy", "p2p"): (PRE_COPY, PRE_COPY_P2P),
    WITHOUT_P2P: (RUNNING_P2P, PRE_COPY_P2P),
    ALL: (),
}


def kernels_way(names: States, start: MigrationState, end: MigrationState) -> list[MigrationState] | None:
    if end in LACKING[names]:
        return None
    way: list[MigrationState] = []
    while (at := way[-1] if way else start) is not end:
        step = NEXT[at][end]
        while step in LACKING[names]:
            step = NEXT[step][end]
        if step is ERROR:
            return None
        way.append(step)
    return way


@pytest.mark.parametrize("names", LACKING, ids="+".join)
def test_every_pair_of_states(names: States) -> None:
    flags = MigrationFlags(sum(STATES[name] for name in names))
    with machine(states=names, memory=PAGE) as one:
        assert struct.unpack("<Q", one.driver.feature(GET | Feature.MIGRATION, b""))[0] == flags
        for start, end in itertools.product([state for state in NEXT if state not in LACKING[names]], NEXT):
            expected = kernels_way(names, start, end)
            assert path(flags, start, end) == expected
            one.device.reset()
            one.go(start)
            assert one.state is start
            if expected is None or (start is RESUMING and expected):  # where nothing was loaded
                with refused(errno.EINVAL):
                    one.go(end)
                assert one.state is start
            else:
                one.go(end)
                assert one.state is end


@pytest.mark.parametrize("value", [0, 8, 99, 0xFFFF_FFFF])
def test_what_is_no_state_to_go_to(value: int) -> None:
    with machine() as one:
        with refused(errno.EINVAL):
            one.driver.set_migration_state(value)
        assert one.state is RUNNING


def test_what_opens_a_stream() -> None:
    with machine() as one:
        opened = [
            one.driver.set_migration_state(state)
            for state in (PRE_COPY, PRE_COPY, PRE_COPY_P2P, STOP_COPY, STOP, STOP_COPY, RESUMING)
        ]
        assert opened == [True, False, False, False, False, True, True]
        one.device.reset()
        assert one.driver.set_migration_state(PRE_COPY_P2P)


def test_the_state_is_told_in_every_state() -> None:
    with machine() as one:
        for state in (STOP, RUNNING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P, STOP_COPY, RESUMING):
            one.go(state)
            assert one.state is state
            assert one.data_size > 0


def test_while_quiet_no_guest_memory_is_written() -> None:
    with machine() as one, guest(one.device, 8) as fd:
        for state in (RUNNING_P2P, PRE_COPY_P2P):
            one.go(state)
            digest = one.digest
            one.device.workload.write(20)
            assert one.digest != digest
            assert not any(os.pread(fd, 8 * PAGE, 0))
        one.go(RUNNING)
        one.device.workload.write(20)
        assert any(os.pread(fd, 8 * PAGE, 0))


def test_nothing_is_written_when_stopped() -> None:
    with machine(dirty_rate=1 << 26, state_time=0.02) as one:
        one.go(STOP)
        digest = one.digest
        for state in (STOP_COPY, STOP, RESUMING):  # each takes time in which a workload would write
            one.go(state)
            assert one.digest == digest


def test_data_is_read_and_written_in_its_states_only() -> None:
    with machine() as one:
        for state in (RUNNING, STOP, RUNNING_P2P, RESUMING):
            one.go(state)
            with refused(errno.EINVAL):
                one.read()
        one.device.reset()
        for state in (RUNNING, STOP, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P, STOP_COPY):
            one.go(state)
            with refused(errno.EINVAL):
                one.driver.write_data(b"x")


# ---- what is pending


def test_what_is_pending_goes_down() -> None:
    with machine() as one:
        whole = one.data_size
        one.go(PRE_COPY)
        again, initial, dirty = one.driver.precopy_info()
        assert (again, dirty) == (False, 0)
        assert initial >= 64 * PAGE
        one.read(10 * PAGE)
        one.device.workload.write(1)
        assert one.driver.precopy_info()[1] < initial - 9 * PAGE
        assert one.driver.precopy_info()[2] == PAGE
        one.read_all()
        assert one.driver.precopy_info() == (False, 0, PAGE)
        assert PAGE < one.data_size < whole
        one.read(10)
        assert one.driver.precopy_info()[2] > PAGE
        one.read_all()
        assert one.driver.precopy_info() == (False, 0, 0)
        one.go(STOP_COPY)
        size = one.data_size
        assert len(one.read_all()) == size
        assert one.data_size == 0
        with refused(errno.EINVAL):
            one.driver.precopy_info()


def test_new_initial_bytes_are_told_to_who_has_opted_in() -> None:
    with machine(pattern="sequential") as one:
        one.go(PRE_COPY)
        one.read_all()
        one.device.workload.write(40)
        assert one.driver.precopy_info() == (False, 0, 40 * PAGE)
        one.driver.feature(SET | Feature.MIG_PRECOPY_INFO_V2, b"")
        assert one.driver.precopy_info() == (True, 40 * PAGE, 0)
        one.read(10)
        again, initial, dirty = one.driver.precopy_info()
        assert (again, dirty) == (False, 0)
        assert initial > 40 * PAGE
        one.read_all()
        one.device.workload.write(10)
        assert one.driver.precopy_info() == (False, 0, 10 * PAGE)


def test_precopy_is_not_asked_about_where_there_is_none() -> None:
    with machine(states=("stop-copy", "p2p")) as one:
        with refused(errno.ENOTTY):
            one.driver.feature(SET | Feature.MIG_PRECOPY_INFO_V2, b"")
        with refused(errno.EINVAL):
            one.driver.precopy_info()


# ---- features


@pytest.mark.parametrize(
    ("flags", "number"),
    [
        (GET | 3, errno.ENOTTY),
        (PROBE | GET | 0xFFFF, errno.ENOTTY),
        (1, errno.EINVAL),
        (GET | SET | Feature.MIG_DEVICE_STATE, errno.EINVAL),
        (SET | Feature.MIGRATION, errno.EINVAL),
        (PROBE | SET | Feature.MIGRATION, errno.EINVAL),
        (1 << 19 | GET | 1, errno.EINVAL),
        (1 << 31 | PROBE | 1, errno.EINVAL),
        (SET | Feature.MIG_DEVICE_STATE, errno.EINVAL),
    ],
)
def test_features_that_are_not_to_be_had(flags: int, number: int) -> None:
    with machine() as one, refused(number):
        one.driver.feature(flags, b"")


# ---- faults


ARC_OPERATIONS = [one for one in OPERATIONS["migration-states"] if "-to-" in one]


def arc_name(start: MigrationState, end: MigrationState) -> str:
    return f"{start.name}-to-{end.name}".lower().replace("_", "-")


def test_each_arc_has_a_name_of_its_own() -> None:
    assert sorted(arc_name(*arc) for arc in ARCS) == sorted(ARC_OPERATIONS)
    assert len(ARCS) == 18


@pytest.mark.parametrize("arc", ARCS, ids=lambda arc: arc_name(*arc))
def test_an_arc_fails_and_then_does_not(arc: tuple[MigrationState, MigrationState]) -> None:
    start, end = arc
    names = ALL if path(MigrationFlags(7), start, end) == [end] else WITHOUT_P2P
    with machine(states=names, memory=0, faults=(parse_fault(f"{arc_name(start, end)}:1:ENOMEM"),)) as one:
        if start is RESUMING:
            one.go(STOP_COPY)
            stream = one.read_all()
        one.go(start)
        if start is RESUMING:
            one.driver.write_data(stream)
        with refused(errno.ENOMEM):
            one.go(end)
        assert one.state is start
        one.go(end)
        assert one.state is end


def test_a_fault_leaves_a_state_on_the_way() -> None:
    with machine(faults=(parse_fault("running-p2p-to-stop:1:EAGAIN"), parse_fault("stop-to-stop-copy:1:EIO"))) as one:
        with refused(errno.EAGAIN):
            one.go(STOP_COPY)
        assert one.state is RUNNING_P2P
        with refused(errno.EIO):
            one.go(STOP_COPY)
        assert one.state is STOP
        one.go(STOP_COPY)
        assert one.state is STOP_COPY


@pytest.mark.parametrize(
    "fault",
    [
        "running-p2p-to-stop:1:error",
        "stop-to-resuming:1:error",
        "data-write:1:error",
        "data-read:1:error",
        "stop-log:1:error",
    ],
)
def test_the_error_state_is_left_by_reset_alone(fault: str) -> None:
    with machine(faults=(parse_fault(fault),), dirty_rate=1 << 26) as one:
        if fault.startswith("data-read"):
            one.go(STOP_COPY)
            with refused(errno.EIO):
                one.read()
        elif fault.startswith("data-write"):
            one.go(RESUMING)
            with refused(errno.EIO):
                one.driver.write_data(b"x")
        elif fault.startswith("stop-log"):
            with refused(errno.EIO):
                one.driver.feature(SET | Feature.DMA_LOGGING_STOP, b"")
        else:
            with refused(errno.EIO):
                one.go(RESUMING)
        assert one.state is ERROR
        digest = one.digest
        for state in MigrationState:
            with refused(errno.EINVAL):
                one.go(state)
        for call in (one.read, lambda: one.driver.write_data(b"x"), one.driver.precopy_info):
            with refused(errno.EINVAL):
                call()
        assert one.state is ERROR
        assert one.data_size
        assert one.digest == digest
        one.device.reset()
        assert one.state is RUNNING
        one.go(STOP_COPY)
        assert one.read()


def test_faults_of_data() -> None:
    with machine(faults=(parse_fault("data-read:2:EIO"), parse_fault("data-write:1:ENOSPC"))) as one:
        one.go(STOP_COPY)
        stream = one.read(1 << 16)
        with refused(errno.EIO):
            one.read()
        stream += one.read_all()
        one.go(RESUMING)
        with refused(errno.ENOSPC):
            one.driver.write_data(stream)
        one.driver.write_data(stream)
        one.go(RUNNING)


def test_closing_ends_a_change_that_takes_its_time() -> None:
    with machine(state_time=3600.0) as one:
        closer = threading.Timer(0, one.device.close)
        closer.start()
        with refused(errno.ENODEV):
            one.go(STOP)
        closer.join()


def test_operations_of_every_interface_are_all_there_are() -> None:
    assert set(itertools.chain.from_iterable(OPERATIONS.values())) == set(Operation)
