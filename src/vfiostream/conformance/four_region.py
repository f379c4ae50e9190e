"""Rules for the four regions of 2019. Lines are those of the thread in which they were proposed."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from vfiostream.access.contract import Access, RegionInfo
from vfiostream.conformance.rules import Broken, NotTestable, Rulebook, together
from vfiostream.conformance.stream import too_much
from vfiostream.conformance.subject import (
    GUEST_IOVA,
    GUEST_PAGES,
    MAX_STREAM,
    Opener,
    Subject,
    bits,
    named,
    refusal,
)
from vfiostream.devices.control import Control
from vfiostream.devices.regions import Region
from vfiostream.errors import DeviceRefused
from vfiostream.uapi.four_region import (
    INTERFACE_VERSION,
    MAX_VERSION,
    NATURAL,
    PACKED,
    REGION_TYPE,
    VERSION_SUBTYPE,
    Caps,
    ControlLayout,
    State,
    Subtype,
)
from vfiostream.uapi.vfio import REGION_TYPE_PCI_VENDOR

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_RANGE = struct.Struct("<QQ")
NOT_STATES = (4, 5, 0x80, 0xFFFF_FFFF)
NOT_ACTIONS = (0, 3, 99)
HUGE = 1 << 62
"""Bytes that no device has."""


class Saved(NamedTuple):
    """The state of a device."""

    memory: bytes
    config: bytes


class FourRegionSubject(Subject):
    """A device with the four regions."""

    def __init__(self, opener: Opener, access: Access, infos: Sequence[RegionInfo]) -> None:
        """``infos`` are all regions; one is a control region."""
        super().__init__(opener, access)
        self.infos = [info for info in infos if info.type == REGION_TYPE and info.size]
        self._version_region = next((info for info in infos if _has_version(info)), None)
        self.control_info = next(info for info in infos if info.subtype == Subtype.CONTROL)
        self.layout: ControlLayout = PACKED if self.control_info.size < NATURAL.size else NATURAL
        self._saved: Saved | None = None

    @property
    def control(self) -> Control:
        return Control(self.access, self.control_info.index, self.layout)

    def info(self, subtype: Subtype) -> RegionInfo:
        """The region of ``subtype``; raises :class:`NotTestable` where there is none."""
        for info in self.infos:
            if info.subtype == subtype:
                return info
        raise NotTestable(f"the device has no {subtype.name.lower()} region")

    async def data_region(self, subtype: Subtype) -> Region:
        return await self.region(self.info(subtype).index, f"{subtype.name.lower()} region")

    async def put(self, offset: int, data: bytes) -> None:
        """Write to the control region what no operation would."""
        await self.access.write(self.control_info.index, offset, data)

    async def require(self, cap: Caps) -> None:
        if cap not in Caps(await self.control.get_caps()):
            raise NotTestable(f"the driver does not have the capability {cap.name}")

    async def run(self) -> None:
        await self.control.set_state(State.RUNNING)

    async def stop(self) -> None:
        await self.control.set_state(State.STOP_LOGGING)

    # ---- the version

    async def version(self) -> str | None:
        info = self._version_region
        if info is None:
            return await self.access.version()
        into = bytearray(info.size)
        await self.access.read_into(info.index, 0, memoryview(into))
        return into.rstrip(b"\0").decode(errors="replace") or None

    async def accepts(self, version: str) -> bool:
        info = self._version_region
        if info is None:
            return await self.access.accepts_version(version)
        return await refusal(self.access.write(info.index, 0, version.encode())) is None

    # ---- what the operations are put together to

    async def capture(self, size: int | None = None) -> bytes:
        """Let the driver capture its memory (or have it, of ``size``), and fetch it."""
        size = await self.control.get_memory_size() if size is None else size
        if size > MAX_STREAM:
            raise too_much()
        region, whole = await self.data_region(Subtype.MEMORY), bytearray(size)
        for pos in range(0, size, region.size):
            await self.control.get_memory(pos)
            await region.read(0, memoryview(whole)[pos : pos + region.size])
        return bytes(whole)

    async def config(self) -> bytes:
        size = await self.control.get_config_size()
        region = await self.data_region(Subtype.CONFIG)
        if not 0 < size <= region.size:
            raise Broken(f"the config has {size} bytes, and its region {region.size}")
        await self.control.get_config()
        into = bytearray(size)
        await region.read(0, memoryview(into))
        return bytes(into)

    async def saved(self) -> Saved:
        """The device's state, saved when it is first asked for. Leaves the device reset."""
        if self._saved is None:
            await self.reset()
            await self.control.set_state(State.STOP)
            try:
                has_memory = Caps.DEVICE_MEMORY in Caps(await self.control.get_caps())
                self._saved = Saved(await self.capture() if has_memory else b"", await self.config())
            except DeviceRefused as error:
                raise NotTestable(f"there is no state to load, since saving failed: {error}") from error
            await self.reset()
        return self._saved

    async def load_memory(self, data: bytes) -> None:
        region = await self.data_region(Subtype.MEMORY)
        await self.control.set_memory_size(len(data))
        for pos in range(0, len(data), region.size):
            await region.write(0, memoryview(data)[pos : pos + region.size])
            await self.control.set_memory(pos)

    async def load_config(self, data: bytes) -> None:
        await self.control.set_config_size(len(data))
        await (await self.data_region(Subtype.CONFIG)).write(0, memoryview(data))
        await self.control.set_config()

    async def load(self, saved: Saved) -> None:
        """Stop the device, load it and let it run."""
        await self.control.set_state(State.STOP)
        await self.load_data(saved)
        await self.control.set_state(State.RUNNING)

    async def load_data(self, saved: Saved) -> None:
        if saved.memory:
            await self.load_memory(saved.memory)
        await self.load_config(saved.config)

    async def bitmap(self) -> set[int]:
        """The pages told to be dirty of the guest memory of a check."""
        into = bytearray(GUEST_PAGES // 8)
        await self.control.get_bitmap(GUEST_IOVA, GUEST_PAGES)
        await (await self.data_region(Subtype.BITMAP)).read(0, memoryview(into))
        return bits(into)


def _has_version(info: RegionInfo) -> bool:
    """Whether that is the region of a driver's version, in the vendor's own type."""
    in_vendors = info.type is not None and info.type & REGION_TYPE_PCI_VENDOR != 0
    return in_vendors and (info.subtype, info.size) == (VERSION_SUBTYPE, MAX_VERSION)


FOUR: Rulebook[FourRegionSubject] = Rulebook("four regions (2019)")


# ---- what there is


@FOUR.rule(
    "regions",
    "Control and config regions are there, each subtype once; the control region can't be mapped, and has the size of "
    "one of its layouts.",
    "lines 7490 to 7505; the layouts: 1320 and 2481",
)
async def regions(subject: FourRegionSubject) -> None:
    seen = []
    subtypes = [info.subtype for info in subject.infos]
    known = [int(one) for one in Subtype]
    for subtype in set(subtypes):
        if subtype not in known:
            seen.append(f"there is the unknown subtype {subtype}")
        elif subtypes.count(subtype) > 1:
            seen.append(f"there are {subtypes.count(subtype)} {Subtype(subtype).name.lower()} regions")
    if Subtype.CONFIG not in subtypes:
        seen.append("there is no config region")
    control = subject.control_info
    if control.mappable:
        seen.append("the control region can be mapped")
    if control.size != PACKED.size and control.size < NATURAL.size:
        seen.append(f"the control region has {control.size} bytes, not {PACKED.size} or {NATURAL.size}")
    for info in subject.infos:
        if not info.readable or not (info.writable or info.subtype == Subtype.BITMAP):
            seen.append(f"region {info.index} can't be both read and written")
    together(seen)


@FOUR.rule("version", f"The interface has version {INTERFACE_VERSION}, in every state.", "operation 1, line 1172")
async def version(subject: FourRegionSubject) -> None:
    seen = []
    for state in State:
        await subject.control.set_state(state)
        if (found := await subject.control.get_version()) != INTERFACE_VERSION:
            seen.append(f"in {state.name} it was {found}")
    together(seen)


@FOUR.rule(
    "caps",
    "The capabilities are known ones, the same in every state, and those that the regions are for.",
    "operation 2, line 1178; the regions: 7490",
)
async def caps(subject: FourRegionSubject) -> None:
    expected = Caps(0)
    subtypes = [info.subtype for info in subject.infos]
    for cap, subtype in ((Caps.DEVICE_MEMORY, Subtype.MEMORY), (Caps.SYSTEM_MEMORY, Subtype.BITMAP)):
        if subtype in subtypes:
            expected |= cap
    seen = []
    for state in State:
        await subject.control.set_state(state)
        if (found := await subject.control.get_caps()) != expected:
            seen.append(f"in {state.name} they were {found:#x}, and the regions say {int(expected):#x}")
    together(seen)


@FOUR.rule(
    "version-string",
    "A driver that tells its version takes that version, and refuses what can be none.",
    "lines 12437 to 12444",
)
async def version_string(subject: FourRegionSubject) -> str:
    own = await subject.version()
    if own is None:
        raise NotTestable("the driver tells no version")
    if not await subject.accepts(own):
        raise Broken(f"its own version, {own!r}, was refused")
    if await subject.accepts("no driver's version"):
        raise Broken("it took what is no driver's version")
    return own


# ---- states


@FOUR.rule(
    "changes-permitted",
    "All twelve changes between the four states are taken, and so is the state that the device has.",
    "operation 3, lines 1186 to 1203; the state it has: docs/architecture.md, the four-region session",
)
async def changes_permitted(subject: FourRegionSubject) -> None:
    seen = []
    for start in State:
        for end in State:
            await subject.reset()
            await subject.control.set_state(start)
            if refused := await refusal(subject.control.set_state(end)):
                seen.append(f"{start.name} -> {end.name} was refused with {named(refused)}")
    together(seen)


@FOUR.rule("states-refused", "What is none of the four states is refused.", "operation 3, lines 1186 to 1203")
async def states_refused(subject: FourRegionSubject) -> None:
    seen = []
    for value in NOT_STATES:
        if await refusal(subject.put(subject.layout.device_state, _U32.pack(value))) is None:
            seen.append(f"{value:#x} was taken")
    together(seen)


@FOUR.rule(
    "reset-told",
    "A device that can be moved says that it can be reset, as there may be no other way out of a failed load.",
    "linux/vfio.h, VFIO_DEVICE_FLAGS_RESET",
)
async def reset_told(subject: FourRegionSubject) -> None:
    if not subject.access.info.can_reset:
        raise Broken("its flags do not have VFIO_DEVICE_FLAGS_RESET")


@FOUR.rule("reset", "A reset in each state makes the device run: then nothing can be loaded.", "VFIO_DEVICE_RESET")
async def reset(subject: FourRegionSubject) -> None:
    if refused := await refusal(subject.access.reset()):
        raise NotTestable(f"a reset was refused with {named(refused)}")
    saved = await subject.saved()
    seen = []
    for state in State:
        await subject.control.set_state(state)
        await subject.access.reset()
        if await refusal(subject.load_data(saved)) is None:
            seen.append(f"after a reset in {state.name}, memory and config were taken")
            await subject.reset()
    together(seen)


# ---- config


@FOUR.rule(
    "config-size",
    "The config has at least a byte, at most as many as its region, and can be had in every state.",
    "operations 4 and 6, lines 1204 and 1217",
)
async def config_size(subject: FourRegionSubject) -> None:
    seen = []
    for state in State:
        await subject.control.set_state(state)
        try:
            await subject.config()
        except DeviceRefused as refused:
            seen.append(f"in {state.name} it was refused with {named(refused)}")
        except Broken as broken:
            seen.append(f"in {state.name}: {broken}")
    together(seen)


@FOUR.rule("config-too-large", "A config larger than its region is refused.", "operation 7, line 1227: it is one piece")
async def config_too_large(subject: FourRegionSubject) -> None:
    await subject.control.set_state(State.STOP)
    size = subject.info(Subtype.CONFIG).size
    for too_many in (size + 1, HUGE):
        refused = await refusal(subject.control.set_config_size(too_many))
        if (refused or await refusal(subject.control.set_config())) is None:
            raise Broken(f"a config of {too_many} bytes was taken, and its region has {size}")


@FOUR.rule("actions-refused", "What is no action is refused.", "the actions, lines 1132 to 1152")
async def actions_refused(subject: FourRegionSubject) -> None:
    await subject.control.set_state(State.STOP)
    fields = [("config", subject.layout.config_action)]
    if Caps.DEVICE_MEMORY in Caps(await subject.control.get_caps()):
        fields.append(("memory", subject.layout.memory_action))
    seen = []
    for name, offset in fields:
        for action in NOT_ACTIONS:
            if await refusal(subject.put(offset, _U32.pack(action))) is None:
                seen.append(f"action {action} on the {name} was taken")
    together(seen)


# ---- memory, out


@FOUR.rule(
    "size-captures",
    "Outside LOGGING each read of the memory's size captures all of it; under LOGGING the first captures all, and the "
    "next, of a stopped device, less.",
    "operation 8, line 1234; what was dirty before: 10310",
)
async def size_captures(subject: FourRegionSubject) -> None:
    await subject.require(Caps.DEVICE_MEMORY)
    await subject.control.set_state(State.STOP)
    whole = len(await subject.capture())
    again = len(await subject.capture())
    if again != whole:
        raise Broken(f"outside LOGGING, a capture had {whole} bytes, and the next {again}")
    await subject.reset()
    await subject.control.set_state(State.STOP_LOGGING)
    first = len(await subject.capture())
    then = len(await subject.capture())
    if first < whole:
        raise Broken(f"the first capture under LOGGING had {first} bytes, and all of the memory has {whole}")
    if then >= whole:
        raise Broken(f"of a device that is stopped, a capture under LOGGING had {then} bytes, after one of {first}")


@FOUR.rule(
    "unfetched-kept",
    "What was captured and not fetched is captured again.",
    "the review, line 7142; a driver keeps what was not fetched",
)
async def unfetched_kept(subject: FourRegionSubject) -> None:
    await subject.require(Caps.DEVICE_MEMORY)
    await subject.control.set_state(State.STOP_LOGGING)
    first = await subject.control.get_memory_size()
    again = await subject.control.get_memory_size()
    if again < first:
        raise Broken(f"{first} bytes were captured and not fetched, and then {again}")


@FOUR.rule(
    "chunk-positions",
    "A position is a multiple of the memory region's length and within the capture; others are refused.",
    "operation 10, lines 1250 to 1254",
)
async def chunk_positions(subject: FourRegionSubject) -> None:
    await subject.require(Caps.DEVICE_MEMORY)
    await subject.control.set_state(State.STOP)
    size = await subject.control.get_memory_size()
    chunk = subject.info(Subtype.MEMORY).size
    seen = []
    for pos in range(0, min(size, 4 * chunk), chunk):
        if refused := await refusal(subject.control.get_memory(pos)):
            seen.append(f"position {pos} was refused with {named(refused)}")
    beyond = -(-size // chunk) * chunk
    for pos in (1, chunk - 1, beyond, HUGE):
        if await refusal(subject.control.get_memory(pos)) is None:
            seen.append(f"position {pos} was taken, of {size} bytes in chunks of {chunk}")
    together(seen)


@FOUR.rule(
    "region-untouched",
    "The driver touches a data region only when it is told to: what was put there stays.",
    "lines 2303 to 2317",
)
async def region_untouched(subject: FourRegionSubject) -> None:
    await subject.run()
    region = await subject.data_region(Subtype.CONFIG)
    mark = bytes(range(251)) * (region.size // 251 + 1)
    await region.write(0, memoryview(mark)[: region.size])
    await subject.control.get_version()
    await subject.control.get_config_size()
    for state in State:
        await subject.control.set_state(state)
    found = bytearray(region.size)
    await region.read(0, memoryview(found))
    if found != mark[: region.size]:
        raise Broken("what was put in the config region has changed, and no action was asked for")


# ---- load


@FOUR.rule("load", "Memory and config are taken as they were saved, and then the device runs.", "operations 5 to 11")
async def load(subject: FourRegionSubject) -> None:
    saved = await subject.saved()
    if refused := await refusal(subject.target.load(saved)):
        raise Broken(f"it was refused: {refused}")


@FOUR.rule(
    "load-stop-only",
    "Memory and config are taken in STOP only, and refused in the other states.",
    "the order of a load: stopped first, lines 1227 and 1261; refusing is a decision of ours",
)
async def load_stop_only(subject: FourRegionSubject) -> None:
    saved = await subject.saved()
    seen = []
    for state in (State.RUNNING, State.RUNNING_LOGGING, State.STOP_LOGGING):
        ways: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("config was", lambda: subject.target.load_config(saved.config))
        ]
        if saved.memory:
            ways.append(("memory was", lambda: subject.target.load_memory(saved.memory)))
        for what, way in ways:
            await subject.target.reset()
            await subject.target.control.set_state(state)
            if await refusal(way()) is None:
                seen.append(f"in {state.name}, {what} taken")
    await subject.target.reset()
    together(seen)


@FOUR.rule("load-too-large", "More memory than the device has is refused.", "the review, line 1917")
async def load_too_large(subject: FourRegionSubject) -> None:
    await subject.require(Caps.DEVICE_MEMORY)
    await subject.control.set_state(State.STOP)
    if await refusal(subject.control.set_memory_size(HUGE)) is None:
        raise Broken(f"{HUGE} bytes of memory were announced, and that was taken")


@FOUR.rule(
    "load-positions",
    "A chunk behind the end of what was announced is refused.",
    "operation 11, line 1261; 1917",
)
async def load_positions(subject: FourRegionSubject) -> None:
    saved, target = await subject.saved(), subject.target
    if not saved.memory:
        raise NotTestable("the device has no memory of its own")
    await target.control.set_state(State.STOP)
    await target.control.set_memory_size(len(saved.memory))
    chunk = target.info(Subtype.MEMORY).size
    beyond = -(-len(saved.memory) // chunk) * chunk
    seen = []
    for pos in (beyond, HUGE):
        if await refusal(target.control.set_memory(pos)) is None:
            seen.append(f"a chunk at {pos} of {len(saved.memory)} bytes was taken")
    await target.reset()
    together(seen)


@FOUR.rule(
    "load-short",
    "A device whose memory was not loaded whole does not take the config and run.",
    "lines 644 and 6177",
)
async def load_short(subject: FourRegionSubject) -> None:
    saved, target = await subject.saved(), subject.target
    if not saved.memory:
        raise NotTestable("the device has no memory of its own")
    chunk = target.info(Subtype.MEMORY).size
    await target.control.set_state(State.STOP)
    await target.control.set_memory_size(len(saved.memory))
    if len(saved.memory) > chunk:
        await (await target.data_region(Subtype.MEMORY)).write(0, memoryview(saved.memory)[:chunk])
        await target.control.set_memory(0)
    refused = await refusal(target.load_config(saved.config)) or await refusal(target.control.set_state(State.RUNNING))
    await target.reset()
    if refused is None:
        raise Broken("part of the memory was loaded, then the config, and then the device ran")


@FOUR.rule("load-config-damaged", "A config whose first bytes are damaged is refused.", "the review, line 644")
async def load_config_damaged(subject: FourRegionSubject) -> None:
    saved, target = await subject.saved(), subject.target
    bad = bytes(byte ^ 0xFF for byte in saved.config[:8]) + saved.config[8:]
    refused = await refusal(target.load(Saved(saved.memory, bad)))
    await target.reset()
    if refused is None:
        raise Broken("it was taken, and then the device ran")


# ---- dirty pages


@FOUR.rule(
    "bitmap-forms",
    "A bitmap is asked for in one write of 16 bytes, or in two of 8 of which the second triggers it.",
    "operation 12, line 1270; the two forms are a decision of ours",
)
async def bitmap_forms(subject: FourRegionSubject) -> None:
    await subject.require(Caps.SYSTEM_MEMORY)
    async with subject.guest():
        await subject.control.set_state(State.RUNNING_LOGGING)
        seen = []
        at = subject.layout.start_addr
        if refused := await refusal(subject.put(at, _RANGE.pack(GUEST_IOVA, GUEST_PAGES))):
            seen.append(f"one write was refused with {named(refused)}")
        two = await refusal(subject.put(at, _U64.pack(GUEST_IOVA))) or await refusal(
            subject.put(subject.layout.page_nr, _U64.pack(GUEST_PAGES))
        )
        if two is not None:
            seen.append(f"two writes were refused with {named(two)}")
        together(seen)


@FOUR.rule("bitmap-too-large", "A bitmap that does not fit its region is refused.", "operation 12, line 1280")
async def bitmap_too_large(subject: FourRegionSubject) -> None:
    await subject.require(Caps.SYSTEM_MEMORY)
    async with subject.guest():
        await subject.control.set_state(State.RUNNING_LOGGING)
        pages = subject.info(Subtype.BITMAP).size * 8 + 1
        seen = []
        for count in (pages, HUGE):
            if await refusal(subject.control.get_bitmap(GUEST_IOVA, count)) is None:
                seen.append(f"one of {count} pages was taken")
        together(seen)


@FOUR.rule(
    "bitmap-empty", "Outside LOGGING no page is told to be dirty, whatever was written.", "operation 12, line 1277"
)
async def bitmap_empty(subject: FourRegionSubject) -> str | None:
    await subject.require(Caps.SYSTEM_MEMORY)
    async with subject.guest() as guest:
        await subject.run()
        remark = None
        try:
            await guest.let_write()
        except NotTestable:
            remark = "the device was not seen to write"
        try:
            told = await subject.bitmap()
        except DeviceRefused as refused:
            return f"it was refused with {named(refused)}"
        if told:
            raise Broken(f"{len(told)} pages were told in RUNNING")
        return remark


@FOUR.rule("bitmap-complete", "Every page that the device writes under LOGGING is told.", "operation 12, line 1283")
async def bitmap_complete(subject: FourRegionSubject) -> str:
    await subject.require(Caps.SYSTEM_MEMORY)
    async with subject.guest() as guest:
        await subject.control.set_state(State.RUNNING_LOGGING)
        before = await guest.let_write()
        await subject.stop()
        written = guest.changed(before)
        if missing := written - await subject.bitmap():
            raise Broken(f"{len(missing)} of {len(written)} pages that were written were not told")
        return f"{len(written)} pages were written and told"


@FOUR.rule(
    "bitmap-clears",
    "What a bitmap told is not told again.",
    "operation 12, line 1283",
)
async def bitmap_clears(subject: FourRegionSubject) -> None:
    await subject.require(Caps.SYSTEM_MEMORY)
    async with subject.guest() as guest:
        await subject.control.set_state(State.RUNNING_LOGGING)
        await guest.let_write()
        await subject.stop()
        first = await subject.bitmap()
        if again := first & await subject.bitmap():
            raise Broken(f"{len(again)} pages were told twice, and the device was stopped")


@FOUR.rule("stopped-still", "A stopped device does no DMA: in STOP and in STOP with LOGGING.", "operation 3, line 1186")
async def stopped_still(subject: FourRegionSubject) -> None:
    seen = []
    for state in (State.STOP, State.STOP_LOGGING):
        await subject.reset()
        async with subject.guest() as guest:
            await guest.let_write()
            await subject.control.set_state(state)
            if pages := await guest.is_still():
                seen.append(f"in {state.name} it wrote {len(pages)} pages of guest memory")
    together(seen)
