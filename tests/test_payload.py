"""What compressing content comes to, at every level, with and without a probe."""

from __future__ import annotations

import random

import pytest

from vfiostream.protocol.framing import FLAG_ZSTD
from vfiostream.protocol.payload import MAX_LEVEL, MIN_LEVEL, SAMPLE, SAMPLES, Compressor, Decompressor

MIB = 1 << 20
NOISE = random.Random(1).randbytes(MIB)
TEXT = b"".join(b"line %d of something that is much like the other lines\n" % number for number in range(30000))[:MIB]


def restored(payload: bytes | None, size: int) -> bytes:
    assert payload is not None
    return bytes(Decompressor().content(payload, FLAG_ZSTD, size, "x"))


def test_every_level_gives_what_went_in() -> None:
    compressor, content = Compressor(), TEXT[:100000]
    for level in range(MIN_LEVEL, MAX_LEVEL + 1):
        if level:
            assert restored(compressor.compress(content, level), len(content)) == content


def test_the_level_can_change_with_each_call_and_counts() -> None:
    compressor = Compressor()
    sizes = [len(compressor.compress(TEXT, level) or TEXT) for level in (-5, 9, -5, 1, 9)]
    assert sizes[1] < sizes[3] < sizes[0]
    assert (sizes[0], sizes[1]) == (sizes[2], sizes[4])


def test_the_level_it_was_made_with_is_used_if_none_is_given() -> None:
    assert Compressor(9).compress(TEXT) == Compressor().compress(TEXT, 9)


@pytest.mark.parametrize("level", [MIN_LEVEL - 1, 0, MAX_LEVEL + 1])
def test_a_level_that_there_is_not_is_refused(level: int) -> None:
    with pytest.raises(ValueError, match=f"no zstd level {level} here"):
        Compressor().compress(TEXT, level)


@pytest.mark.parametrize("level", [-5, 1, 19])
@pytest.mark.parametrize("probe", [False, True])
def test_noise_is_not_compressed(level: int, probe: bool) -> None:
    assert Compressor().compress(NOISE, level, probe=probe) is None


def test_a_probe_spares_the_trouble() -> None:
    # What shrinks is where it does not look, so it can be seen that nothing else did either.
    content = bytearray(NOISE)
    content[MIB // 4 : MIB // 4 + 65536] = bytes(65536)
    assert Compressor().compress(content, 1) is not None
    assert Compressor().compress(content, 1, probe=True) is None


@pytest.mark.parametrize("at", [0, MIB // 2 - 65536, MIB - 131072])
def test_a_probe_finds_an_eighth_that_shrinks_at_any_of_its_places(at: int) -> None:
    content = bytearray(NOISE)
    content[at : at + 131072] = TEXT[:131072]
    assert Compressor().compress(content, 1, probe=True) is not None


def test_with_a_probe_what_shrinks_comes_to_the_same() -> None:
    assert Compressor().compress(TEXT, 1, probe=True) == Compressor().compress(TEXT, 1)


@pytest.mark.parametrize("size", [1, 100, SAMPLE, 2 * SAMPLES * SAMPLE, 2 * SAMPLES * SAMPLE + 1, 100001])
def test_content_of_any_size_and_kind_can_be_probed(size: int) -> None:
    content = bytes(size)
    payloads = [
        Compressor().compress(kind, 1, probe=True) for kind in (content, bytearray(content), memoryview(content))
    ]
    assert payloads[0] == payloads[1] == payloads[2]
    if size > SAMPLE:
        assert restored(payloads[0], size) == content
