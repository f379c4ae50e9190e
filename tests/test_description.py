"""Descriptions of devices: what a device says of itself, what a checkpoint and a description file keep of it, and what
two of them come to. Every pair of a device, a checkpoint and a description has an answer.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import anyio
import pytest
from hypothesis import given, settings, strategies as st

import vfiostream
from tests.between import Between
from tests.device_contract import driver, served
from vfiostream import description_text, read_description
from vfiostream.access.contract import DeviceInfo
from vfiostream.compatibility import check
from vfiostream.description import MAX_DEPTH, MAX_FILE, parse_description
from vfiostream.devices import open_device
from vfiostream.devices.contract import DescribedDevice, Device, DeviceDescription, PciIdentity
from vfiostream.devices.finding import find
from vfiostream.devices.fit import compare
from vfiostream.errors import BadDescription, DeviceRefused, Incompatible, StreamError, TransportError, UsageError
from vfiostream.protocol import limits
from vfiostream.uapi.vfio import FEATURE_DATA_SIZE, Feature, FeatureOperation
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.settings import Interface

pytestmark = pytest.mark.anyio

PCI = PciIdentity(0x1AF4, 0x1041, 0x1AF4, 0x1100, 0x020000, 1)
NIC = DeviceDescription(
    interface="migration-states",
    version="nic 2",
    device_memory=True,
    dirty_tracking=True,
    config_size=0,
    config_limit=0,
    pci=PCI,
    driver="nic-vfio",
    kernel="6.8.0",
    flags=("stop-copy", "p2p", "pre-copy", "dma-log"),
    data_size=1 << 20,
)
BARE = replace(NIC, version=None, pci=None, driver=None, kernel=None, flags=("stop-copy",), data_size=None)
TEXT = description_text(DescribedDevice("vfio:nic", NIC))


def described(**changes: Any) -> DescribedDevice:
    return DescribedDevice("vfio:nic", replace(NIC, **changes))


# ---- what a device says


class Host(Between):
    """A device as a kernel has it: with the name of its driver, and a version outside of any region."""

    versions: tuple[str, ...] = ()
    """The first is its own; the others are taken, too."""
    data_size: int | None = None
    """By the driver's estimate; None where it can't be asked."""
    logs_itself = True

    def __init__(self, access: Any, **changes: Any) -> None:
        super().__init__(access)
        info = access.info
        self.info = DeviceInfo(info.is_pci, info.can_reset, info.num_regions, info.num_irqs, "nic-vfio", "6.8.0")
        for name, value in changes.items():
            setattr(self, name, value)

    async def version(self) -> str | None:
        return self.versions[0] if self.versions else None

    async def accepts_version(self, version: str) -> bool:
        return not self.versions or version in self.versions

    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        if feature == Feature.MIG_DATA_SIZE:
            if self.data_size is None:
                raise DeviceRefused(self.name, "feature", 25)
            return FEATURE_DATA_SIZE.pack(self.data_size)
        if feature == Feature.DMA_LOGGING_START and operation & FeatureOperation.PROBE and not self.logs_itself:
            raise DeviceRefused(self.name, "feature", 25)
        return await super().feature(operation, feature, data, size)


@asynccontextmanager
async def host(interface: Interface = "migration-states", **changes: Any) -> AsyncIterator[Device]:
    """A small device of the kernel's, as ``Host`` has it."""
    with driver(interface=interface) as one:
        async with await find(Host(InProcessAccess(one, "vfio:nic"), **changes)) as device:
            yield device


FLAGS: dict[str, tuple[str, ...]] = {
    "four-region": ("device-memory", "system-memory"),
    "migration-region": ("dma-log",),
    "migration-states": ("stop-copy", "p2p", "pre-copy", "dma-log"),
}


@pytest.mark.parametrize("interface", get_args(Interface))
async def test_a_device_describes_itself(interface: Interface) -> None:
    with driver(interface=interface) as one, served(one) as path:
        async with await open_device(f"vfio-user:{path}") as device:
            about = device.description
    assert about.interface == interface
    assert about.flags == FLAGS[interface]
    assert (about.driver, about.kernel) == (None, None)  # a server does not say what it is
    assert (about.data_size is not None) == (interface == "migration-states")


@pytest.mark.parametrize("interface", get_args(Interface))
async def test_the_driver_and_kernel_of_a_host(interface: Interface) -> None:
    async with host(interface) as device:
        assert (device.description.driver, device.description.kernel) == ("nic-vfio", "6.8.0")


@pytest.mark.parametrize("interface", ["migration-region", "migration-states"])
async def test_who_logs_is_said(interface: Interface) -> None:
    async with host(interface, logs_itself=False) as device:
        assert device.description.flags[-1] == "iommu-log"
    with driver(interface=interface, dirty_tracking=False) as one:
        async with await find(InProcessAccess(one)) as silent:
            assert not {"dma-log", "iommu-log"} & set(silent.description.flags)


async def test_a_driver_that_has_less() -> None:
    with driver(interface="migration-states", states=("stop-copy",)) as one:
        async with await find(InProcessAccess(one)) as device:
            assert device.description.flags == ("stop-copy", "dma-log")
    async with host(data_size=5 << 40) as device:
        assert device.description.data_size == 5 << 40
    async with host(data_size=None) as device:
        assert device.description.data_size is None


# ---- what of a difference matters


REASONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"interface": "four-region"}, "speaks the interface migration-states, the target four-region"),
    ({}, {"device_memory": False}, "the source has device memory and the target has none"),
    ({"device_memory": False}, {}, "the target has device memory and the source has none"),
    ({}, {"dirty_tracking": False}, "the source writes guest memory and reports it, the target does not"),
    ({"config_size": 9}, {"config_limit": 8}, "config of 9 bytes does not fit the target's config region of 8"),
    ({}, {"pci": None}, "one is a PCI device and the other is not"),
    ({}, {"pci": replace(PCI, vendor=1)}, "PCI device 1af4:1041, the target 0001:1041"),
    ({}, {"pci": replace(PCI, device=1)}, "PCI device 1af4:1041, the target 1af4:0001"),
    ({}, {"pci": replace(PCI, class_code=1)}, "of PCI class 020000, the target of 000001"),
    ({"flags": ()}, {}, "the source's driver does not have stop-copy"),
    ({}, {"flags": ("p2p", "pre-copy")}, "the target's driver does not have stop-copy"),
]
NOTES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"driver": "mic-vfio"}, "the source's driver is nic-vfio, the target's mic-vfio"),
    ({}, {"kernel": "6.9.1"}, "the source's kernel is 6.8.0, the target's 6.9.1"),
    ({}, {"pci": replace(PCI, subsystem=7)}, "of PCI subsystem 1af4:1100, the target of 1af4:0007"),
    ({}, {"pci": replace(PCI, subsystem_vendor=7)}, "of PCI subsystem 1af4:1100, the target of 0007:1100"),
    ({}, {"pci": replace(PCI, revision=2)}, "the source is of revision 01, the target of 02"),
    ({}, {"flags": ("stop-copy", "p2p")}, "pre-copy"),
    ({}, {"flags": ("stop-copy", "pre-copy")}, "p2p"),
]
NOTHING: list[dict[str, Any]] = [
    {},
    {"driver": None},
    {"kernel": None},
    {"data_size": None},
    {"config_limit": 1 << 30},
    {"flags": (*NIC.flags[:-1], "iommu-log")},
    {"flags": (*NIC.flags, "of tomorrow")},
]


@pytest.mark.parametrize(("source", "target", "said"), REASONS)
def test_what_stands_against_it(source: dict[str, Any], target: dict[str, Any], said: str) -> None:
    found = compare(replace(NIC, **source), replace(NIC, **target))
    (reason,) = found.reasons
    assert said in reason
    assert found.notes == []


@pytest.mark.parametrize(("source", "target", "said"), NOTES)
def test_what_is_worth_knowing(source: dict[str, Any], target: dict[str, Any], said: str) -> None:
    found = compare(replace(NIC, **source), replace(NIC, **target))
    (note,) = found.notes
    assert said in note
    assert found.reasons == []


@pytest.mark.parametrize("changes", NOTHING)
def test_what_does_not_matter(changes: dict[str, Any]) -> None:
    assert compare(NIC, replace(NIC, **changes)) == ([], [], False)


# ---- every pair


async def as_checkpoint(device: Device, path: Path) -> DescribedDevice:
    async with vfiostream.connect(f"file:{path}") as file:
        await vfiostream.save(device, file)
    return await read_description(path)


async def as_file(device: Device, path: Path) -> DescribedDevice:
    path.write_text(description_text(device))
    return await read_description(path)


KINDS = {"checkpoint": as_checkpoint, "description": as_file}


@pytest.mark.parametrize("interface", get_args(Interface))
@pytest.mark.parametrize("target", ["device", *KINDS])
@pytest.mark.parametrize("source", ["device", *KINDS])
async def test_every_pair_has_its_answer(source: str, target: str, interface: Interface, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        given: list[Device | DescribedDevice] = []
        for number, kind in enumerate((source, target)):
            device = await stack.enter_async_context(host(interface, versions=(f"nic {number}", "nic 0")))
            given.append(device if kind == "device" else await KINDS[kind](device, tmp_path / str(number)))
            assert given[-1].description == device.description
            assert given[-1].name == device.name
        answer = await check(*given)
        assert (answer.source, answer.target) == tuple(one.description for one in given)
        assert answer.reasons == ()
        # The four regions' driver is asked in a region of its own, which says what it was in both.
        assert answer.driver_asked == (target == "device")
        if target == "device":
            assert answer.notes == ()
        else:
            (note,) = answer.notes
            assert note.startswith("vfio:nic is only described, so its driver was not asked whether it takes version ")

        # The other way, the source's driver is asked for what it does not take.
        back = await check(given[1], given[0])
        refused = source == "device" and interface != "four-region"
        assert bool(back.reasons) == refused
        assert all("does not take version 'nic 1'" in reason for reason in back.reasons)


async def test_one_alone_can_move() -> None:
    async with host(versions=("nic 1",)) as device:
        answer = await check(device)
        assert (answer.target, answer.driver_asked, answer.reasons, answer.notes) == (None, False, (), ())
    (note,) = (await check(described(dirty_tracking=False))).notes
    assert "can't write guest memory while it is migrated" in note


async def test_a_replay_is_told() -> None:
    class Replay(Host):
        @property
        def caveat(self) -> str:
            return "vfio:nic is a record"

    with driver(interface="migration-states") as one:
        async with await find(Replay(InProcessAccess(one, "vfio:nic"))) as device:
            for given in ((device,), (device, described(version=None)), (described(version=None), device)):
                assert "vfio:nic is a record" in (await check(*given)).notes


async def test_a_version_alone_is_for_a_driver() -> None:
    async with host(versions=("nic 1", "nic 0")) as device:
        taken = await check("nic 0", device)
        assert (taken.source, taken.target, taken.driver_asked) == (None, device.description, True)
        assert taken.reasons == taken.notes == ()
        refused = await check("nic 2", device)
        assert refused.reasons == ("the target's driver (version 'nic 1') does not take version 'nic 2'",)
    for target in (described(), None):
        with pytest.raises(UsageError, match="only a driver knows"):
            await check("nic 0", target)


async def test_a_driver_without_versions_is_not_asked() -> None:
    async with host() as device:
        for source in (described(), "nic 2"):
            answer = await check(source, device)
            assert not answer.driver_asked
            assert "has no versions, so it was not asked about 'nic 2'" in answer.notes[-1]
        answer = await check(described(version=None), device)
        assert not any("version" in note for note in answer.notes)
    (note,) = (await check(described(version=None), described())).notes
    assert note == "vfio:nic is only described, so its driver was not asked"
    (note,) = (await check(described(), described(version=None))).notes
    assert note.endswith("whether it takes version 'nic 2'; it had none")


async def test_notes_of_a_migration_are_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vfiostream.pipeline")
    async with host() as source:
        await as_checkpoint(source, tmp_path / "file")
    with driver(interface="migration-states") as one:
        access = Host(InProcessAccess(one, "vfio:other"))
        access.info = replace(access.info, kernel="6.9.1")
        async with (
            await find(access) as target,
            vfiostream.listen(f"file:{tmp_path / 'file'}") as listener,
            await listener.accept() as file,
        ):
            await vfiostream.restore(file, target)
    assert "vfio:other: the source's kernel is 6.8.0, the target's 6.9.1" in caplog.text


# ---- of a checkpoint, its head alone


async def test_only_the_head_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    async with host("four-region") as device:
        await as_checkpoint(device, path)
        whole = path.read_bytes()
        head = 48 + struct.unpack_from("<I", whole, 12)[0]
        for content in (whole[:head], whole[:head] + b"\xff" * 4096):
            path.write_bytes(content)
            assert (await read_description(path)).description == device.description
    path.write_bytes(whole[: head - 1])
    with pytest.raises(StreamError, match=rf"^file:{path}: HELLO record 1 has content that does not match"):
        await read_description(path)
    path.write_bytes(whole[:47])
    with pytest.raises(StreamError, match=rf"^file:{path}: record 1 is cut"):
        await read_description(path)
    path.write_bytes(whole[:4] + b"\1" + whole[5:])
    with pytest.raises(StreamError, match="is of format 1, this side speaks format 2"):
        await read_description(path)


async def test_a_checkpoint_of_several_devices_is_none_of_one(tmp_path: Path) -> None:
    async with (
        host() as one,
        host() as other,
        vfiostream.connect(f"file:{tmp_path / 'file'}") as file,
    ):
        await vfiostream.save([one, other], file)
    with pytest.raises(Incompatible, match="holds 2 devices"):
        await read_description(tmp_path / "file")


# ---- description files, which may be anybody's


@pytest.mark.parametrize("about", [NIC, BARE, replace(NIC, version="é" * 2048, driver="x" * 256)])
async def test_what_is_written_is_read(about: DeviceDescription, tmp_path: Path) -> None:
    text = description_text(DescribedDevice("Gerät [1]", about))
    assert text.isascii()
    assert (tmp_path / "file").write_text(text) < MAX_FILE
    assert await read_description(tmp_path / "file") == DescribedDevice("Gerät [1]", about)


def test_the_bytes_of_a_description() -> None:
    written = (Path(__file__).parent / "golden" / "description.json").read_text()
    assert json.loads(TEXT) == {**json.loads(written), "software": json.loads(TEXT)["software"]}
    assert parse_description(written.encode()).description == NIC


def test_the_largest_description_fits() -> None:
    """Six bytes of ASCII are the most that a code point of text takes for each of its bytes in UTF-8: two or more."""
    long, longest = "é" * (limits.MAX_NAME // 2), "é" * (limits.MAX_TEXT // 2)
    flags = tuple(f"{flag:é>{limits.MAX_FLAG // 2 - 1}}" for flag in range(limits.MAX_FLAGS))
    full = DeviceDescription(
        long, longest, True, True, limits.MAX_CONFIG, (1 << 64) - 1, PCI, long, long, flags, (1 << 64) - 1
    )
    assert len(description_text(DescribedDevice(long, full))) < MAX_FILE // 2


async def test_a_device_that_no_description_can_hold() -> None:
    with pytest.raises(Incompatible, match="vfio:nic can't be described: version is not a printable text"):
        description_text(described(version="two\nlines"))


def changed(**changes: Any) -> bytes:
    return json.dumps({**json.loads(TEXT), **changes}).encode()


def changed_device(**changes: Any) -> bytes:
    return changed(device={**json.loads(TEXT)["device"], **changes})


def without(*path: str) -> bytes:
    values = json.loads(TEXT)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return json.dumps(values).encode()


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is no JSON"),
    "no JSON": (b"nic 1", "it is no JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "it is not UTF-8"),
    "half of it": (TEXT.encode()[:-5], "it is no JSON"),
    "more behind it": (TEXT.encode() + b"{}", "it is no JSON"),
    "an array": (b"[]", "it is no JSON object with vfiostream_description"),
    "another object": (b'{"name": "vfio:nic"}', "it is no JSON object with vfiostream_description"),
    "another version": (changed(vfiostream_description=2), "it is of version 2, and version 1 is known here"),
    "true for a version": (changed(vfiostream_description=True), "it is of version that is not a number"),
    "a huge version": (changed(vfiostream_description=1 << 4000), "it is of version that is not a number"),
    "a number too long": (b'{"vfiostream_description": ' + b"1" * 5000 + b"}", "digits"),
    "one key more": (changed(more=1), "it is not an object of just"),
    "one key less": (without("software"), "it is not an object of just"),
    "no device": (changed(device=None), "its device is not an object of just"),
    "a stream": (changed_device(stream=1), "its device is not an object of just"),
    "one key of the device less": (without("device", "flags"), "its device is not an object of just"),
    "one key of its PCI identity less": (without("device", "pci", "vendor"), "pci of its device is not an object"),
    "a PCI identity that is a text": (changed_device(pci="x"), "pci of its device is not an object"),
    "a key twice": (TEXT.encode().replace(b'"kernel"', b'"driver"'), "a key stands twice"),
    "a float": (changed_device(config_size=1.0), "config_size is 1.0"),
    "not a number": (changed_device(config_size=float("nan")), "config_size is nan"),
    "a negative number": (changed_device(data_size=-1), "data_size is -1"),
    "65 bits": (changed_device(config_limit=1 << 64), "config_limit is 18446744073709551616"),
    "half a surrogate": (TEXT.encode().replace(b"nic 2", b"\\ud800"), "version is not a printable text"),
    "a control character": (changed_device(name="\x1b[2J"), "name is not a printable text"),
    "a long name": (changed_device(driver="x" * 257), "driver is not a printable text of at most 256"),
    "a long version": (changed_device(version="x" * 4097), "version is not a printable text of at most 4096"),
    "a flag twice": (changed_device(flags=["p2p", "p2p"]), "flags are not at most 16 different"),
    "a flag that is an array": (changed_device(flags=[[]]), "deep"),
    "a flag that is a number": (changed_device(flags=[1]), "flag is not a printable text"),
    "flags that are a text": (changed_device(flags="p2p"), "are not all arrays"),
    "too large": (TEXT.encode() + b" " * MAX_FILE, f"it has more than {MAX_FILE} bytes"),
    "too deep": (b"[" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} deep"),
    "as deep as it can be": (b"[" * MAX_FILE, f"more than {MAX_DEPTH} deep"),
    "objects too deep": (b'{"a":' * 10000, f"more than {MAX_DEPTH} deep"),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_description_that_is_refused(what: str, tmp_path: Path) -> None:
    content, said = BAD[what]
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(BadDescription) as caught:
        await read_description(path)
    text = str(caught.value)
    assert text.startswith(f"file:{path} is neither a checkpoint nor a description of a device: ")
    assert said in text
    assert len(text) < 1000


@st.composite
def near(draw: st.DrawFn) -> bytes:
    """A description with some of its bytes replaced, taken out or repeated, or with another value somewhere."""
    if draw(st.booleans()):
        data = bytearray(TEXT.encode())
        for _ in range(draw(st.integers(1, 4))):
            start = draw(st.integers(0, len(data)))
            end = draw(st.integers(start, min(start + 40, len(data))))
            data[start:end] = draw(st.one_of(st.binary(max_size=12), st.just(bytes(data[start:end]) * 2)))
        return bytes(data)
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    anything = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
    values = json.loads(TEXT)
    inner: dict[str, Any] = draw(st.sampled_from([values, values["device"], values["device"]["pci"]]))
    inner[draw(st.sampled_from(list(inner)))] = draw(anything)
    return json.dumps(values).encode()


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | near())
def test_any_bytes_are_a_description_or_refused(data: bytes) -> None:
    said, found = "", None
    try:
        found = parse_description(data)
    except ValueError as error:
        said = str(error)
    assert len(said) < 1000
    if found is not None:
        assert parse_description(description_text(found).encode()) == found


async def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(BadDescription, match="is no file"):
            with anyio.fail_after(5):
                await read_description(tmp_path / name)
    for path in (tmp_path / "missing", Path("\0")):
        with pytest.raises(TransportError, match="can't be opened"):
            await read_description(path)
