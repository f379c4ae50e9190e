"""The kernel's own sample device with the migration states of Linux 5.18: it is here, and its state moves by hand."""

from __future__ import annotations

import os
import struct

import pytest

from tests.kernel.conftest import MakeHolder, MakeMdev
from tests.kernel.mtty_device import (
    MIGRATION,
    RESUMING,
    RUNNING,
    SCRATCH,
    STOP,
    STOP_COPY,
    get_state,
    set_state,
)
from tests.kernel.raw_vfio import FEATURE_GET, Info, RawDevice

BAR0 = 0


@pytest.mark.parametrize("together", [True, False], ids=["one holder", "two holders"])
def test_state_moves_from_one_device_to_another(mdev: MakeMdev, holder: MakeHolder, *, together: bool) -> None:
    first = holder()
    source = first.open(mdev("mtty-2"))
    target = (first if together else holder()).open(mdev("mtty-2"))
    assert struct.unpack("<Q", source.feature(MIGRATION, FEATURE_GET, bytes(8))) == (7,)
    bar = source.info(BAR0)
    source.write(bar, SCRATCH, b"\x5a")  # the scratch register of a serial port
    assert scratch(target, bar) != 0x5A

    out = set_state(source, STOP_COPY)
    data = os.read(out, 4096)
    assert data
    assert os.read(out, 4096) == b""
    os.close(out)
    into = set_state(target, RESUMING)
    assert os.write(into, data) == len(data)
    os.close(into)
    set_state(target, RUNNING)
    set_state(source, STOP)
    assert (get_state(source), get_state(target)) == (STOP, RUNNING)
    assert scratch(target, bar) == 0x5A


def scratch(device: RawDevice, bar: Info) -> int:
    return device.read(bar, SCRATCH, 1)[0]
