"""The reference device by itself: states, fields of the control region, the regions beside the four, settings."""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.vendor_operations import (
    BAR0,
    BITMAP,
    CONFIG,
    CONTROL,
    IOVA,
    MEMORY,
    PAGE,
    PCI_CONFIG,
    RUNNING,
    RUNNING_LOGGING,
    STOP,
    STOP_LOGGING,
    VERSION,
    Direct,
    Operations,
    finish,
    opened,
    refused,
)
from vfiostream.errors import UsageError
from vfiostream.uapi.four_region import Action, Caps, State
from vfiostream.vendor.settings import OPERATIONS, Operation, Settings, parse_fault


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(State, 2)))
def test_every_transition_is_legal(before: State, after: State) -> None:
    with opened() as (_, ops):
        ops.set_state(before)
        ops.set_state(after)
        assert ops.state is after


@pytest.mark.parametrize("value", [4, 5, 0xFFFF_FFFF])
def test_other_states_are_refused(value: int) -> None:
    with opened() as (_, ops):
        ops.set_state(STOP)
        with refused(errno.EINVAL):
            ops.set_state(value)
        assert ops.state is STOP


@pytest.mark.parametrize("layout", ["natural", "packed"])
def test_a_round_trip_in_either_layout(layout: str) -> None:
    with opened(seed=1, layout=layout) as (device, source), opened(seed=2, layout=layout) as (_, target):
        assert len(device.regions) == 14
        assert device.regions[CONTROL].size == source.layout.size
        assert source.get32(source.layout.version) == 1
        assert source.get32(source.layout.caps) == Caps.DEVICE_MEMORY | Caps.SYSTEM_MEMORY
        target.set_state(STOP)
        source.set_state(RUNNING_LOGGING)
        target.load(source.capture())
        device.workload.write(5)
        finish(source, target)
        assert source.digest == target.digest
        assert target.state is RUNNING


def test_write_only_fields_read_as_nothing() -> None:
    with opened() as (_, ops):
        ops.set_state(STOP)
        ops.put64(ops.layout.memory_pos, 123)
        assert ops.get32(ops.layout.device_state) == 0
        assert ops.get32(ops.layout.memory_action) == 0
        assert ops.get64(ops.layout.memory_pos) == 0
        assert ops.get64(ops.layout.page_nr) == 0


def test_accesses_that_are_not_of_a_field_are_refused() -> None:
    with opened() as (device, ops):
        regions = Direct(device)
        fields = {
            ops.layout.version: 4, ops.layout.device_state: 4, ops.layout.caps: 4, ops.layout.config_action: 4,
            ops.layout.config_size: 8, ops.layout.memory_action: 4, ops.layout.memory_size: 8,
            ops.layout.memory_pos: 8, ops.layout.start_addr: 8, ops.layout.page_nr: 8,
        }  # fmt: skip
        for offset, count in itertools.product(range(80), (1, 2, 3, 4, 8, 12, 16, 72)):
            if fields.get(offset) == count:
                continue
            with refused(errno.EINVAL):
                regions.read(CONTROL, offset, count)
            if (offset, count) != (ops.layout.start_addr, 16):
                with refused(errno.EINVAL):
                    regions.write(CONTROL, offset, bytes(count))
        for offset in (ops.layout.version, ops.layout.caps):
            with refused(errno.EINVAL):
                regions.write(CONTROL, offset, bytes(4))


@pytest.mark.parametrize("action", [0, 3, 4])
def test_unknown_actions_are_refused(action: int) -> None:
    with opened() as (_, ops):
        for offset in (ops.layout.config_action, ops.layout.memory_action):
            with refused(errno.EINVAL):
                ops.put32(offset, action)


def test_without_device_memory_there_is_neither_region_nor_operation() -> None:
    with opened(memory=0, dirty_tracking=False) as (device, ops):
        assert ops.get32(ops.layout.caps) == 0
        assert device.regions[MEMORY].size == 0
        assert device.regions[BITMAP].size == 0
        with refused(errno.EOPNOTSUPP):
            ops.get_memory_size()
        with refused(errno.EOPNOTSUPP):
            ops.get_bitmap(0, 1)
        with refused(errno.EINVAL):
            ops.regions.read(MEMORY, 0, 1)


def test_a_device_without_memory_moves_by_its_config() -> None:
    with opened(memory=0, seed=1) as (_, source), opened(memory=0, seed=2) as (_, target):
        target.set_state(STOP)
        assert source.digest != target.digest
        target.set_config(source.get_config())
        target.set_state(RUNNING)
        assert source.digest == target.digest


# ---- the other regions


def test_bar0_has_digest_and_state_and_is_read_only() -> None:
    with opened() as (device, ops):
        regions = Direct(device)
        ops.set_state(STOP_LOGGING)
        bar = regions.read(BAR0, 0, 4096)
        assert bar == ops.digest + struct.pack("<I", STOP_LOGGING) + bytes(4096 - 36)
        assert regions.read(BAR0, 30, 4) == bar[30:34]
        with refused(errno.EPERM):
            regions.write(BAR0, 0, b"\0")


def test_pci_config_space_is_that_of_a_device() -> None:
    with opened() as (device, _):
        regions = Direct(device)
        config = regions.read(PCI_CONFIG, 0, 256)
        assert struct.unpack_from("<HH", config) == (0x5653, 0x0001)
        assert config[9:12] == b"\0\0\x12"
        regions.write(PCI_CONFIG, 0, bytes([0xFF]) * 256)
        after = regions.read(PCI_CONFIG, 0, 256)
        assert after[:4] == config[:4]
        assert struct.unpack_from("<I", after, 0x10) == (0xFFFF_F000,)  # a BAR of 4 KiB
        assert struct.unpack_from("<I", after, 0x14) == (0,)
        assert after[6:12] == config[6:12]
        seen, at = [], after[0x34]
        while at:
            seen.append(after[at])
            at = after[at + 1]
        assert seen == [0x05, 0x11]
        assert struct.unpack_from("<HIIHHII", after, 0x52) == (
            0x0181, 0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF, 0, 1, 0
        )  # fmt: skip
        assert struct.unpack_from("<H", after, 0x72) == (0xC003,)
        device.reset()
        assert regions.read(PCI_CONFIG, 0, 256) == config


def test_versions() -> None:
    with opened(version_string="gen3", accept=("gen[12]", "lab-*")) as (device, _):
        regions = Direct(device)
        assert regions.read(VERSION, 0, 4096) == b"gen3".ljust(4096, b"\0")
        for taken in (b"gen3", b"gen1", b"gen2\0\0\0", b"lab-", b"lab-x"):
            regions.write(VERSION, 0, taken)
        for foreign in (b"gen4", b"gen", b"GEN1", b"\0", b"\xff\xfe"):
            with refused(errno.EINVAL):
                regions.write(VERSION, 0, foreign)
        with refused(errno.EINVAL):
            regions.write(VERSION, 1, b"gen3")


def test_the_version_tells_devices_apart_that_do_not_fit() -> None:
    assert Settings().version == Settings(seed=1, memory_region=PAGE, layout="packed").version
    assert Settings().version != Settings(memory=PAGE).version
    assert Settings().version != Settings(config=PAGE).version


@pytest.mark.parametrize("index", [BAR0, PCI_CONFIG, CONTROL, CONFIG, MEMORY, BITMAP, VERSION, 3, 14, 1 << 31])
def test_bounds_of_every_region(index: int) -> None:
    with opened() as (device, _):
        regions = Direct(device)
        size = device.regions[index].size if index < len(device.regions) else 0
        for offset, count in ((size, 1), (0, size + 1), (size - 1, 2), ((1 << 64) - 1, 2), (0, 0)):
            with refused(errno.EINVAL):
                regions.read(index, offset, count)
            with refused(errno.EINVAL):
                regions.write(index, offset, bytes(count))


@pytest.mark.parametrize(
    ("size", "areas"),
    [
        (4096, ()),
        (8192, ()),
        (3 * 4096, ((2 * 4096, 4096),)),
        (8 * 4096, ((4096, 3 * 4096), (5 * 4096, 3 * 4096))),
    ],
)
def test_sparse_regions_leave_pages_out(size: int, areas: tuple[tuple[int, int], ...]) -> None:
    with opened(mmap="sparse", memory_region=size) as (device, _):
        assert device.regions[MEMORY].mappable == areas


# ---- settings and faults


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": 1},
        {"memory": -PAGE},
        {"config": 0},
        {"config": PAGE, "config_region": PAGE},
        {"memory_region": 0},
        {"bitmap_region": 100},
        {"dirty_rate": -1},
        {"capture_time": -1.0},
        {"state_time": float("nan")},
        {"pattern": "zigzag"},
        {"data": "music"},
        {"mmap": "some"},
        {"layout": "loose"},
        {"version_string": "x" * 5000},
        {"interface": "five-region"},
        {"states": ("pre-copy", "p2p")},
        {"states": ("stop-copy", "go")},
        {"faults": (parse_fault("report:1:EIO"),)},
        {"faults": (parse_fault("set-state:1:error"),)},
        {"faults": (parse_fault("set-state:1:EIO"),), "interface": "migration-states"},
    ],
)
def test_settings_that_no_device_can_have(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Settings(**changes)


@pytest.mark.parametrize(
    "text",
    ["", "get-memory", "get-memory:1", "get-memory:0:EIO", "get-memory:-1:EIO", "get-memory:x:EIO", "dance:1:EIO",
     "get-memory:1:EWHAT", "get-memory:1:errorcode", "get-memory:1:5", "get-memory:1:EIO:more"],
)  # fmt: skip
def test_faults_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match=r"fault|operation|count|errno"):
        parse_fault(text)


def attempts(ops: Operations) -> dict[Operation, Callable[[], object]]:
    layout = ops.layout
    return {
        Operation.GET_VERSION: lambda: ops.get32(layout.version),
        Operation.GET_CAPS: lambda: ops.get32(layout.caps),
        Operation.SET_STATE: lambda: ops.set_state(RUNNING),
        Operation.GET_CONFIG_SIZE: lambda: ops.get64(layout.config_size),
        Operation.SET_CONFIG_SIZE: lambda: ops.put64(layout.config_size, 1),
        Operation.GET_CONFIG: lambda: ops.put32(layout.config_action, Action.GET_BUFFER),
        Operation.SET_CONFIG: lambda: ops.put32(layout.config_action, Action.SET_BUFFER),
        Operation.GET_MEMORY_SIZE: ops.get_memory_size,
        Operation.SET_MEMORY_SIZE: lambda: ops.set_memory_size(1),
        Operation.GET_MEMORY: lambda: ops.put32(layout.memory_action, Action.GET_BUFFER),
        Operation.SET_MEMORY: lambda: ops.put32(layout.memory_action, Action.SET_BUFFER),
        Operation.GET_BITMAP: lambda: ops.get_bitmap(IOVA, 8),
    }


@pytest.mark.parametrize("operation", OPERATIONS["four-region"])
def test_the_second_operation_fails_and_no_other(operation: Operation) -> None:
    with opened(faults=(parse_fault(f"{operation}:2:ENOMEM"),)) as (_, ops):
        struck = []
        for _ in range(3):
            for name, attempt in attempts(ops).items():
                try:
                    attempt()
                except OSError as error:  # what loads data is refused with EBUSY while the device runs
                    struck.append((name, error.errno == errno.ENOMEM))
                else:
                    struck.append((name, False))
        names = OPERATIONS["four-region"]
        assert struck == [(name, turn == 1 and name is operation) for turn in range(3) for name in names]
