"""PCI config space: what moves, in which order, and what is not believed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, strategies as st

from vfiostream.devices.contract import PciIdentity
from vfiostream.devices.pci import MAX_CAPABILITIES, MAX_SIZE, MIN_SIZE, identity, restore_writes
from vfiostream.errors import Incompatible


def config(size: int = 256, /, **fields: bytes) -> bytes:
    """Config space of a network function with MSI at 0x50 (64 bit, maskable, 8 vectors) and MSI-X at 0x70; each of
    ``fields`` is put at the offset its name says (``at_04``).
    """
    space = bytearray(size)
    struct.pack_into("<HHHHI", space, 0, 0x8086, 0x10CA, 0, 0x0010, 0x020000 << 8 | 3)
    struct.pack_into("<HH", space, 0x2C, 0x1AF4, 0x1100)
    if size >= 256:
        space[0x34] = 0x40
        space[0x40:0x42] = b"\x01\x50"  # power management
        space[0x50:0x54] = b"\x05\x70\x86\x01"
        space[0x70:0x74] = b"\x11\x00\x09\x00"
    else:
        space[0x06] = 0
    for name, data in fields.items():
        offset = int(name.removeprefix("at_"), 16)
        space[offset : offset + len(data)] = data
    return bytes(space)


EVERYTHING = {
    "at_04": b"\xff\xff\xff\xff",  # command and status
    "at_0c": b"\x10\x40",
    "at_10": b"\xaa" * 24,  # BARs
    "at_30": b"\xaa" * 4,  # ROM
    "at_3c": b"\x0b\x01",
    "at_52": b"\xb7\x01",  # MSI: 8 vectors enabled, and on
    "at_54": b"\x00\x10\xe0\xfe\x01\x00\x00\x00\x41\x42\x00\x00\x0f\x00\x00\x00\xff\x00\x00\x00",
    "at_72": b"\x09\xc0",  # MSI-X: masked and on
}


def test_the_writes_in_their_order() -> None:
    assert restore_writes(config(**EVERYTHING), config()) == [
        (0x0C, b"\x10\x40"),
        (0x3C, b"\x0b"),
        (0x54, b"\x00\x10\xe0\xfe"),
        (0x58, b"\x01\x00\x00\x00"),
        (0x5C, b"\x41\x42"),
        (0x60, b"\x0f\x00\x00\x00"),
        (0x52, b"\xb7\x01"),
        (0x72, b"\x09\xc0"),
        (0x04, b"\x47\x05"),
    ]


def test_bits_that_do_not_move_stay_as_they_are() -> None:
    writes = dict(restore_writes(config(), config(**EVERYTHING)))
    assert writes[0x04] == b"\xb8\xfa"
    assert writes[0x52] == b"\x86\x01"
    assert writes[0x72] == b"\x09\x00"


@pytest.mark.parametrize(
    ("control", "registers"),
    [
        (b"\x00\x00", [(0x54, 4), (0x58, 2)]),
        (b"\x80\x00", [(0x54, 4), (0x58, 4), (0x5C, 2)]),
        (b"\x00\x01", [(0x54, 4), (0x58, 2), (0x5C, 4)]),
        (b"\x80\x01", [(0x54, 4), (0x58, 4), (0x5C, 2), (0x60, 4)]),
    ],
)
def test_the_registers_of_each_kind_of_msi(control: bytes, registers: list[tuple[int, int]]) -> None:
    space = config(at_52=control)
    writes = restore_writes(space, space)
    assert [(offset, len(data)) for offset, data in writes[2:-3]] == registers
    assert [offset for offset, _ in writes[-3:]] == [0x52, 0x72, 0x04]


@pytest.mark.parametrize("size", [MIN_SIZE, 128])
def test_a_device_without_interrupt_capabilities(size: int) -> None:
    assert [offset for offset, _ in restore_writes(config(size), config(size))] == [0x0C, 0x3C, 0x04]


def test_a_list_that_status_does_not_announce_is_not_walked() -> None:
    space = config(at_06=b"\x00\x00", at_34=b"\x41")
    assert [offset for offset, _ in restore_writes(space, space)] == [0x0C, 0x3C, 0x04]


def test_the_extended_space_does_not_matter() -> None:
    saved = config(MAX_SIZE, at_100=b"\xff" * 3840)
    assert restore_writes(saved, config()) == restore_writes(config(), config())


def test_identity() -> None:
    assert identity(config()) == PciIdentity(0x8086, 0x10CA, 0x1AF4, 0x1100, 0x020000, 3)
    assert identity(config(at_0e=b"\x80")) == identity(config())  # several functions


@pytest.mark.parametrize("size", [0, MIN_SIZE - 1, MAX_SIZE + 1])
def test_what_is_no_config_space(size: int) -> None:
    with pytest.raises(Incompatible, match=f"{size} bytes"):
        identity(bytes(size))
    with pytest.raises(Incompatible, match=f"{size} bytes"):
        restore_writes(bytes(size), config())


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"at_00": b"\x87"}, "vendor 0x8087"),
        ({"at_02": b"\xcb"}, "device 0x10cb"),
        ({"at_09": b"\x01"}, "class 0x020001"),
        ({"at_0e": b"\x01"}, "header type 1"),
        ({"at_52": b"\x06\x01"}, "32 bit"),
        ({"at_52": b"\x86\x00"}, "not maskable"),
        ({"at_52": b"\x8a\x01"}, "32 vectors"),
        ({"at_72": b"\x08"}, "9 vectors"),
        ({"at_41": b"\x70"}, "has MSI-X at 0x70 .10 vectors., here MSI at"),
        ({"at_51": b"\x00"}, "has MSI at 0x50 .64 bit, 8 vectors, maskable., here MSI at"),
        ({"at_34": b"\x00"}, "has none, here MSI at"),
        ({"at_41": b"\x90", "at_90": b"\x05\x70\x86\x01"}, "MSI at 0x90"),
    ],
)
def test_another_kind_of_device_is_refused(fields: dict[str, bytes], what: str) -> None:
    with pytest.raises(Incompatible, match=what):
        restore_writes(config(**fields), config())
    with pytest.raises(Incompatible):
        restore_writes(config(), config(**fields))


def test_another_revision_or_subsystem_is_not_another_kind() -> None:
    assert restore_writes(config(at_08=b"\x09", at_2c=b"\x01\x02\x03\x04"), config()) == restore_writes(
        config(), config()
    )


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"at_41": b"\x40"}, "circle"),
        ({"at_71": b"\x50"}, "circle"),
        ({"at_34": b"\x3c"}, "into the header, to 0x3c"),
        ({"at_41": b"\x04"}, "into the header, to 0x04"),
        ({"at_41": b"\xec", "at_ec": b"\x05\x00\x86\x01"}, "0xec has 24 bytes"),
        ({"at_41": b"\xf8", "at_f8": b"\x11\x00\x00\x00"}, "0xf8 has 12 bytes"),
    ],
)
def test_a_broken_capability_list_is_refused(fields: dict[str, bytes], what: str) -> None:
    with pytest.raises(Incompatible, match=what):
        restore_writes(config(**fields), config())
    with pytest.raises(Incompatible, match=what):
        restore_writes(config(), config(**fields))


def test_a_list_that_points_beyond_a_small_space_is_refused() -> None:
    with pytest.raises(Incompatible, match="ends at 0x40"):
        restore_writes(config(64, at_06=b"\x10", at_34=b"\x40"), config())


def test_the_longest_list_there_can_be_is_walked() -> None:
    space = bytearray(config())
    for entry in range(MAX_CAPABILITIES):
        offset = 0x40 + 4 * entry
        space[offset : offset + 4] = bytes([0x09, (offset + 4) & 0xFF, 0, 0])
    assert [offset for offset, _ in restore_writes(bytes(space), bytes(space))] == [0x0C, 0x3C, 0x04]


@given(saved=st.binary(min_size=0, max_size=400), at=st.integers(0, 255), data=st.binary(max_size=40))
def test_anything_is_either_refused_or_a_list_of_writes_within_the_space(saved: bytes, at: int, data: bytes) -> None:
    damaged = bytearray(config(**EVERYTHING))
    damaged[at : at + len(data)] = data
    for space in (saved, bytes(damaged[:256])):
        try:
            writes = restore_writes(space, config())
        except Incompatible:
            continue
        assert writes[-1][0] == 0x04
        never = set(range(4)) | set(range(6, 0x0C)) | set(range(0x0E, 0x3C)) | set(range(0x3D, 0x50))
        assert all(offset + len(written) <= 256 for offset, written in writes)
        assert not {byte for offset, written in writes for byte in range(offset, offset + len(written))} & never
