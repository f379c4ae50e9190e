"""docs/format.md is enough to write a receiver: here is one, which knows nothing of vfiostream.

What it reads comes from the golden files, which test_protocol_golden.py holds against what is sent.
"""

from __future__ import annotations

import re
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgpack
import pytest
import xxhash
import zstandard

HERE = Path(__file__).parent
FORMAT = (HERE.parent / "docs" / "format.md").read_text()

KEYS = {
    1: "session software features chunk devices ranges",
    2: "session software features chunk credit",
    3: "number",
    4: "number size",
    5: "pos",
    6: "page pages",
    7: "pos",
    8: "number",
    9: "state",
    10: "",
    11: "pos size",
    12: "rounds content",
    13: "limit",
    14: "of number limit",
    15: "",
    16: "code reason stopped",
}
DEVICE = (
    "stream name interface version driver kernel flags device_memory dirty_tracking config_size config_limit data_size "
    "pci vendor device subsystem_vendor subsystem class_code revision"
)
# A letter for each record, where its type is the index; then the section "Order" as a pattern.
LETTERS = "_HWrcmbpRSPCEkaXA"
ORDER = re.compile("H(r[cmbp]*R)*Sr[cmbp]*R[PC]+EX")


def read_frames(data: bytes) -> list[tuple[int, int, dict[str, Any], bytes]]:
    """(type, stream, header, content) of each frame."""
    frames: list[tuple[int, int, dict[str, Any], bytes]] = []
    offset = seed = 0
    while offset < len(data):
        prefix = data[offset : offset + 48]
        magic, version, kind, flags, stream, header_size, sequence, payload_size, content_size, body, check = (
            struct.unpack("<4sHBBIIQIIQQ", prefix)
        )
        assert (magic, version) == (b"VFS\xf1", 2)
        assert check == xxhash.xxh3_64_intdigest(prefix[:40], seed)
        assert header_size <= (524288 if kind == 1 else 8192)
        assert max(payload_size, content_size) <= 16777216
        assert sequence == len(frames) + 1
        header_end = offset + 48 + header_size
        header, payload = data[offset + 48 : header_end], data[header_end : header_end + payload_size]
        assert body == xxhash.xxh3_64_intdigest(header + payload, seed)
        if flags == 1:
            parameters = zstandard.get_frame_parameters(payload)
            assert payload_size < content_size == parameters.content_size
            assert parameters.dict_id == 0
            assert parameters.window_size <= 1 << 23
            content = zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False)
        elif flags == 2:
            assert payload_size == 0 < content_size
            content = bytes(content_size)
        else:
            assert flags == 0
            content = payload
        assert len(content) == content_size
        values = msgpack.unpackb(header)
        assert set(values) == set(KEYS[kind].split())
        assert (stream > 0) == (kind in (4, 5, 6, 7, 10, 11))
        if seed == 0 and "session" in values:
            seed = int.from_bytes(values["session"][:8], "little")
        frames.append((kind, stream, values, content))
        offset = header_end + payload_size
    return frames


class Device:
    def __init__(self) -> None:
        self.captures: list[bytes] = []
        self.announced = 0
        self.pci = self.config = b""


def read_forward(data: bytes) -> tuple[dict[str, Any], dict[int, Device], dict[int, dict[int, bytes]]]:
    """(HELLO, devices by stream, pages by address) of a forward stream."""
    frames = read_frames(data)
    assert ORDER.fullmatch("".join(LETTERS[kind] for kind, *_ in frames))
    hello = frames[0][2]
    devices = {entry["stream"]: Device() for entry in hello["devices"]}
    ranges = {entry["stream"]: entry for entry in hello["ranges"]}
    assert [*devices, *ranges] == list(range(1, len(devices) + len(ranges) + 1))
    memory: dict[int, dict[int, bytes]] = {stream: {} for stream in ranges}
    coming: dict[int, list[int]] = {stream: [] for stream in ranges}
    pos = dict.fromkeys(ranges, 0)
    rounds = total = 0
    for kind, stream, values, content in frames[1:]:
        if kind in (5, 7, 10, 11):
            total += len(content)
        if kind in (3, 8):
            rounds += kind == 3
            assert values["number"] == rounds
        elif kind == 4:
            devices[stream].captures.append(b"")
            devices[stream].announced = values["size"]
            assert values["number"] == len(devices[stream].captures)
        elif kind == 5:
            assert values["pos"] == len(devices[stream].captures[-1])
            devices[stream].captures[-1] += content
            assert len(devices[stream].captures[-1]) <= devices[stream].announced
        elif kind == 6:
            assert not coming[stream]
            bits = [values["page"] + n for n in range(values["pages"]) if content[n // 8] >> n % 8 & 1]
            coming[stream], pos[stream] = [ranges[stream]["address"] + 4096 * page for page in bits], 0
        elif kind == 7:
            assert values["pos"] == pos[stream]
            pos[stream] += len(content)
            for start in range(0, len(content), 4096):
                memory[stream][coming[stream].pop(0)] = content[start : start + 4096]
        elif kind == 10:
            devices[stream].pci = content
        elif kind == 11:
            assert values["pos"] == len(devices[stream].config)
            devices[stream].config += content
            assert len(devices[stream].config) <= values["size"]
        elif kind == 12:
            assert values == {"rounds": rounds, "content": total}
    return hello, devices, memory


def golden(name: str) -> bytes:
    lines = (HERE / "golden" / name).read_text().splitlines()
    return bytes.fromhex("".join(line for line in lines if not line.startswith("#")))


def test_a_receiver_written_from_the_document_reads_the_forward_stream() -> None:
    hello, devices, memory = read_forward(golden("forward.hex"))
    assert hello["session"] == bytes(range(1, 17))
    assert [entry["name"] for entry in hello["devices"]] == ["nic", "Gerät"]
    assert hello["devices"][0]["pci"]["device"] == 0x1041
    assert devices[1].captures == [b"memory-end", b"", bytes(4)]
    assert devices[1].pci.hex().startswith("f41a4110")
    assert (devices[1].config, devices[2].config) == (b"confi", bytes(2))
    assert devices[2].captures == []
    expected_3 = {0x100000000 + 4096 * page: bytes(4096) for page in range(8)} | {0x100008000: b"V" * 4096}
    expected_4 = {4096 * page: bytes(4096) for page in range(399)} | {4096 * 399: b"V" * 4096}
    assert memory == {3: expected_3, 4: expected_4}


def test_a_receiver_written_from_the_document_reads_the_answers() -> None:
    kinds = [(kind, values) for kind, _, values, _ in read_frames(golden("back.hex"))]
    assert [kind for kind, _ in kinds] == [2, 13, 14, 14, 14]
    assert [values["of"] for kind, values in kinds if kind == 14] == ["round", "loaded", "running"]
    assert kinds[0][1]["credit"] >= kinds[0][1]["chunk"] + 65536
    limits: list[int] = [values["credit" if kind == 2 else "limit"] for kind, values in kinds]
    assert all(before <= after for before, after in pairwise(limits))
    [(kind, stream, values, content)] = read_frames(golden("abort.hex"))
    assert (kind, stream, content) == (16, 0, b"")
    assert values == {"code": "incompatible", "reason": "no such device", "stopped": True}


def test_the_prefix_lies_where_the_document_says() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", FORMAT[: FORMAT.index("## Records")], re.MULTILINE)
    table = {name: (int(offset), int(size)) for offset, size, name in rows}
    # MEMORY with ten bytes announced, six of which it holds: the fourth frame of the golden stream.
    data = golden("forward.hex")
    start = 0
    for _ in range(3):
        header, payload = struct.unpack_from("<I", data, start + 12)[0], struct.unpack_from("<I", data, start + 24)[0]
        start += 48 + header + payload
    frame = data[start : start + 48 + 6 + 6]
    assert frame[48:] == b"\x81\xa3pos\x00" + b"memory"
    seed = 0x0807060504030201
    expected = {
        "magic": (0, 4, b"VFS\xf1"),
        "version": (4, 2, struct.pack("<H", 2)),
        "type": (6, 1, b"\x05"),
        "flags": (7, 1, b"\x00"),
        "stream": (8, 4, struct.pack("<I", 1)),
        "header_size": (12, 4, struct.pack("<I", 6)),
        "sequence": (16, 8, struct.pack("<Q", 4)),
        "payload_size": (24, 4, struct.pack("<I", 6)),
        "content_size": (28, 4, struct.pack("<I", 6)),
        "body_check": (32, 8, struct.pack("<Q", xxhash.xxh3_64_intdigest(frame[48:], seed))),
        "prefix_check": (40, 8, struct.pack("<Q", xxhash.xxh3_64_intdigest(frame[:40], seed))),
    }
    assert table == {name: (offset, size) for name, (offset, size, _) in expected.items()}
    for name, (offset, size, value) in expected.items():
        assert frame[offset : offset + size] == value, name


@pytest.mark.parametrize("kind", KEYS)
def test_the_keys_of_each_record_are_those_of_the_document(kind: int) -> None:
    row = re.search(rf"^\| {kind} \| [A-Z_]+ \| (?:S|T|both) \| \w+ \| (.*) \| [^|]* \|$", FORMAT, re.MULTILINE)
    assert row, f"record {kind} is not in the document"
    keys = re.findall(r"`(\w+)`", row[1])
    assert keys == KEYS[kind].split()


def test_the_keys_of_a_device_are_those_of_the_document() -> None:
    table = FORMAT.split("A **device** in HELLO")[1].split("A **range**")[0]
    rows = re.findall(r"^\| (`\w+` \| .*?) \|", table, re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == DEVICE.split()
    entry = read_frames(golden("forward.hex"))[0][2]["devices"][0]
    assert [*entry, *entry["pci"]] == DEVICE.split()
