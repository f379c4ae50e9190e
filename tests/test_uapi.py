"""The layouts, byte for byte, and parsers that get anything at all."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from vfiostream.uapi import vfio, vfio_user
from vfiostream.uapi.vfio import BadCapabilityChain, pack_capabilities, parse_capabilities
from vfiostream.uapi.vfio_user import (
    BadMessage,
    Command,
    pack_message,
    pack_version,
    parse_header,
    parse_version,
)

# ---- region info and its capabilities

INFO = bytes(vfio.REGION_INFO.size)


def capability(number: int, following: int, body: bytes = b"") -> bytes:
    return struct.pack("<HHI", number, 1, following) + body


def test_structures_of_vfio() -> None:
    region = vfio.REGION_INFO.pack(0x01020304, 0xF, 9, 32, 0x1122334455667788, 0x99AABBCCDDEEFF00)
    assert region.hex() == "040302010f0000000900000020000000887766554433221100ffeeddccbbaa99"
    assert vfio.DEVICE_INFO.pack(16, 3, 13, 5).hex() == "10000000030000000d00000005000000"

    migration = vfio.MIGRATION_INFO.pack(2, 0, 3, 4, 5)
    fields = (
        vfio.MIGRATION_INFO_DEVICE_STATE,
        vfio.MIGRATION_INFO_PENDING_BYTES,
        vfio.MIGRATION_INFO_DATA_OFFSET,
        vfio.MIGRATION_INFO_DATA_SIZE,
    )
    assert [migration[offset] for offset in fields] == [2, 3, 4, 5]


def test_capabilities_byte_for_byte() -> None:
    packed = pack_capabilities(32, type_=(2, 3), sparse=[(0x1000, 0x2000)])
    assert packed.hex() == (
        "0200" "0100" "30000000" "02000000" "03000000"  # type, next at 48
        "0100" "0100" "00000000" "01000000" "00000000" "0010000000000000" "0020000000000000"
    )  # fmt: skip
    assert parse_capabilities(INFO + packed, 32) == ((2, 3), ((0x1000, 0x2000),))


U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)


@given(st.none() | st.tuples(U32, U32), st.none() | st.lists(st.tuples(U64, U64), max_size=20), st.binary(max_size=40))
def test_capabilities_come_back(
    type_: tuple[int, int] | None, sparse: list[tuple[int, int]] | None, gap: bytes
) -> None:
    start = 32 + len(gap)
    packed = pack_capabilities(start, type_=type_, sparse=sparse)
    expected = (type_, None if sparse is None else tuple(sparse))
    assert parse_capabilities(INFO + gap + packed, start if packed else 0) == expected


@given(st.binary(max_size=300), U32 | st.integers(0, 300))
def test_any_bytes_are_a_chain_or_a_bad_chain(info: bytes, offset: int) -> None:
    try:
        parse_capabilities(info, offset)
    except BadCapabilityChain:
        pass


@given(st.data())
def test_a_chain_with_any_byte_changed_is_a_chain_or_a_bad_chain(data: st.DataObject) -> None:
    info = bytearray(INFO + pack_capabilities(32, type_=(2, 3), sparse=[(0, 4096), (8192, 4096)]))
    info[data.draw(st.integers(32, len(info) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_capabilities(bytes(info), 32)
    except BadCapabilityChain:
        pass


def test_unknown_capabilities_are_passed_over() -> None:
    info = INFO + capability(99, 48, bytes(8)) + capability(2, 0, struct.pack("<II", 2, 1))
    assert parse_capabilities(info, 32) == ((2, 1), None)


@pytest.mark.parametrize("length", [1, vfio.MAX_CAPABILITIES])
def test_a_chain_may_be_as_long_as_the_limit(length: int) -> None:
    chain = b"".join(capability(99, 32 + 8 * (n + 1) if n + 1 < length else 0) for n in range(length))
    assert parse_capabilities(INFO + chain, 32) == (None, None)


TYPE = struct.pack("<II", 2, 1)


@pytest.mark.parametrize(
    ("chain", "offset"),
    [
        pytest.param(b"", 32, id="nothing there"),
        pytest.param(capability(99, 0), 31, id="inside the info"),
        pytest.param(capability(99, 0), 33, id="header cut"),
        pytest.param(capability(99, 0), 0xFFFFFFFF, id="far away"),
        pytest.param(capability(99, 32), 32, id="points to itself"),
        pytest.param(capability(99, 40) + capability(99, 32), 32, id="points back"),
        pytest.param(capability(99, 16), 32, id="points into the info"),
        pytest.param(capability(99, 41), 32, id="points to the end"),
        pytest.param(capability(2, 0, TYPE[:7]), 32, id="type cut"),
        pytest.param(capability(2, 48, TYPE) + capability(2, 0, TYPE), 32, id="type twice"),
        pytest.param(capability(1, 0, bytes(7)), 32, id="sparse cut"),
        pytest.param(capability(1, 0, struct.pack("<II", 1, 0) + bytes(15)), 32, id="area cut"),
        pytest.param(capability(1, 0, struct.pack("<II", 0xFFFFFFFF, 0) + bytes(64)), 32, id="a lot of areas"),
        pytest.param(capability(1, 48, bytes(8)) + capability(1, 0, bytes(8)), 32, id="sparse twice"),
        pytest.param(
            b"".join(capability(99, 40 + 8 * n) for n in range(vfio.MAX_CAPABILITIES)) + capability(99, 0),
            32,
            id="long",
        ),
    ],
)
def test_a_bad_chain(chain: bytes, offset: int) -> None:
    with pytest.raises(BadCapabilityChain):
        parse_capabilities(INFO + chain, offset)


# ---- messages


def test_structures_of_vfio_user() -> None:
    assert pack_message(7, Command.REGION_READ, b"body").hex() == "07000900140000000000000000000000" + b"body".hex()
    error = pack_message(0xFFFF, 2, flags=vfio_user.FLAG_REPLY | vfio_user.FLAG_ERROR, errno=22)
    assert error.hex() == "ffff0200100000002100000016000000"
    sizes = {
        vfio_user.HEADER: 16,
        vfio_user.DMA_MAP: 32,
        vfio_user.DMA_UNMAP: 24,
        vfio_user.REGION_ACCESS: 16,
        vfio_user.DMA_ACCESS: 16,
        vfio_user.VERSION: 4,
    }
    assert all(structure.size == size for structure, size in sizes.items())


def test_what_a_header_says() -> None:
    header = parse_header(pack_message(5, 9, b"body", flags=0x11)[:16])
    assert (header.msg_id, header.command, header.body_size) == (5, 9, 4)
    assert header.is_reply
    assert not header.is_error
    assert not header.wants_reply
    command = parse_header(pack_message(5, 11)[:16])
    assert not command.is_reply
    assert command.wants_reply


@given(st.binary(max_size=40) | st.binary(min_size=16, max_size=16))
@example(struct.pack("=HHIII", 1, 1, 16, 0, 0))
def test_any_bytes_are_a_header_or_a_bad_message(data: bytes) -> None:
    try:
        header = parse_header(data)
    except BadMessage:
        return
    assert len(data) == 16
    assert 0 <= header.body_size <= vfio_user.MAX_MESSAGE - 16


@pytest.mark.parametrize(
    ("size", "flags"), [(0, 0), (15, 0), (vfio_user.MAX_MESSAGE + 1, 1), (0xFFFFFFFF, 1), (16, 2), (16, 0xF)]
)
def test_a_bad_header(size: int, flags: int) -> None:
    with pytest.raises(BadMessage):
        parse_header(vfio_user.HEADER.pack(1, 9, size, flags, 0))


def test_the_largest_message_is_taken() -> None:
    assert parse_header(vfio_user.HEADER.pack(1, 9, vfio_user.MAX_MESSAGE, 1, 0)).size == vfio_user.MAX_MESSAGE


# ---- VERSION


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", {}),
        (b"\0", {}),
        (b"{}\0", {}),
        (b'{"capabilities": {}}', {}),
        (b'{"capabilities": {"max_msg_fds": 8}, "other": 1}\0', {"max_msg_fds": 8}),
    ],
)
def test_what_version_does_not_say_has_a_default(text: bytes, said: dict[str, Any]) -> None:
    major, minor, capabilities = parse_version(struct.pack("=HH", 0, 1) + text)
    assert (major, minor) == (0, 1)
    assert capabilities == {
        "max_msg_fds": 1,
        "max_data_xfer_size": 1048576,
        "max_dma_maps": 65535,
        "pgsizes": 4096,
        **said,
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.dictionaries(st.text(), JSON, max_size=4))
def test_version_comes_back(major: int, minor: int, said: dict[str, Any]) -> None:
    body = pack_version(major, minor, said)
    assert body.endswith(b"\0")
    assert parse_version(body) == (major, minor, {**vfio_user.DEFAULT_CAPABILITIES, **said})


@given(st.binary(max_size=200))
@example(b"\0\0\1\0" + b"[" * 100_000)
@example(b'\0\0\1\0{"capabilities": ' + b'{"a":' * 100_000)
@example(b"\0\0\1\0" + b"9" * 5000)
@example(b"\0\0\1\0\xff\xfe{\0")
def test_any_bytes_are_a_version_or_a_bad_message(body: bytes) -> None:
    try:
        parse_version(body)
    except BadMessage:
        pass


@given(JSON)
@example({"capabilities": None})
@example({"capabilities": [1]})
def test_any_json_is_a_version_or_a_bad_message(value: Any) -> None:
    try:
        _, _, capabilities = parse_version(struct.pack("=HH", 0, 1) + json.dumps(value).encode())
    except BadMessage:
        return
    assert capabilities.keys() >= vfio_user.DEFAULT_CAPABILITIES.keys()
