"""The accelerator's two twins: the same results, the same refusals."""

from __future__ import annotations

import importlib
import itertools
import mmap
import os
import random
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterable
from functools import partial
from inspect import signature
from types import ModuleType
from typing import Any

import pytest
import xxhash
from hypothesis import given, strategies as st

from vfiostream import _accel
from vfiostream._accel import _pure

PAGE = 64
"""Small, so that a few pages are a few bytes: the twins take any page size."""

U64_MAX = 2**64 - 1


def load_native() -> ModuleType:
    try:
        return importlib.import_module("vfiostream._accel._native")
    except ModuleNotFoundError:
        if os.environ.get("VFIOSTREAM_REQUIRE_NATIVE") == "1":
            pytest.fail("VFIOSTREAM_REQUIRE_NATIVE=1, and the native accelerator is not built")
        pytest.skip("the native accelerator is not built")


class Level:
    """The native twin as it is on another processor. Functions run on the level that was asked for one last."""

    def __init__(self, name: str) -> None:
        self._native = load_native()
        self._name = name
        if name not in self._native.levels():
            pytest.skip(f"this processor has no {name}")

    def __getattr__(self, function: str) -> Any:
        self._native.use_level(self._name)
        return getattr(self._native, function)


LEVELS = ["plain", "avx2", "avx512"]


@pytest.fixture(params=[*LEVELS, "pure"])
def accel(request: pytest.FixtureRequest) -> Any:
    """Either twin, the native one on every level."""
    return _pure if request.param == "pure" else Level(request.param)


@pytest.fixture(scope="module", params=LEVELS)
def native(request: pytest.FixtureRequest) -> Any:
    return Level(request.param)


def unaligned(data: bytes, shift: int = 1) -> memoryview:
    """The bytes of ``data``, writable, at an address that is not a multiple of 8."""
    return memoryview(bytearray(bytes(shift) + data))[shift:]


def slow_runs(bitmap: bytes, bits: int) -> list[int]:
    """What ``bitmap_runs`` means, bit by bit."""
    runs: list[int] = []
    for n in range(bits):
        if bitmap[n // 8] >> n % 8 & 1:
            if runs and sum(runs[-2:]) == n:
                runs[-1] += 1
            else:
                runs += [n, 1]
    return runs


def u64(numbers: Iterable[int]) -> array[int]:
    return array("Q", numbers)


def xxh3(data: bytes, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(data, seed)


# ---- which twin


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "VFIOSTREAM_ACCEL"}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=False, timeout=30
    )


PRINT_IMPLEMENTATION = "from vfiostream import _accel; print(_accel.IMPLEMENTATION, _accel.copy.__module__)"


def test_pure_can_be_forced() -> None:
    assert run_python(PRINT_IMPLEMENTATION, VFIOSTREAM_ACCEL="pure").stdout == "pure vfiostream._accel._pure\n"


@pytest.mark.parametrize("environment", [{}, {"VFIOSTREAM_ACCEL": "native"}], ids=["unset", "native"])
def test_native_is_used_where_it_is_built(native: Any, environment: dict[str, str]) -> None:
    assert run_python(PRINT_IMPLEMENTATION, **environment).stdout == "native vfiostream._accel._native\n"


HIDE_NATIVE = "import importlib.util; importlib.util.find_spec = lambda name: None; "


def test_without_native_the_pure_twin_is_used() -> None:
    assert run_python(HIDE_NATIVE + PRINT_IMPLEMENTATION).stdout == "pure vfiostream._accel._pure\n"


def test_native_forced_but_not_built_is_an_import_error() -> None:
    ran = run_python(HIDE_NATIVE + PRINT_IMPLEMENTATION, VFIOSTREAM_ACCEL="native")
    assert ran.returncode == 1
    assert "ImportError: VFIOSTREAM_ACCEL=native asks for an accelerator that was not built here" in ran.stderr


@pytest.mark.parametrize("choice", ["", "fast", "Native"])
def test_unknown_choice_is_an_import_error(choice: str) -> None:
    ran = run_python(PRINT_IMPLEMENTATION, VFIOSTREAM_ACCEL=choice)
    assert ran.returncode == 1
    assert f"ImportError: VFIOSTREAM_ACCEL is {choice!r}" in ran.stderr


def test_a_level_the_processor_does_not_have_is_refused(native: Any) -> None:
    levels = native.levels()
    assert levels[0] == "plain"
    with pytest.raises(ValueError, match=f"this processor has no level 'abacus': it has {', '.join(levels)}"):
        native.use_level("abacus")


def test_implementation_names_what_is_exported() -> None:
    module = {"native": "vfiostream._accel._native", "pure": "vfiostream._accel._pure"}[_accel.IMPLEMENTATION]
    functions = [getattr(_accel, name) for name in _accel.__all__ if name != "IMPLEMENTATION"]
    assert len(functions) == 12
    assert {function.__module__ for function in functions} == {module}


@pytest.mark.parametrize("name", [name for name in _accel.__all__ if name != "IMPLEMENTATION"])
def test_the_twins_take_the_same_arguments(native: Any, name: str) -> None:
    assert list(signature(getattr(native, name)).parameters) == list(signature(getattr(_pure, name)).parameters)


# ---- is_zero

SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 1000, 65535, 65536, 65537, 200_000]


@pytest.mark.parametrize("size", SIZES)
def test_zeros_are_zero(accel: Any, size: int) -> None:
    assert accel.is_zero(bytes(size)) is True
    assert accel.is_zero(unaligned(bytes(size))) is True


@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_one_set_bit_is_found_wherever_it_is(accel: Any, size: int) -> None:
    data = bytearray(size)
    for at in {0, size // 2, size - 2, size - 1, min(64, size - 1)} & set(range(size)):
        data[at] = 0x80
        assert accel.is_zero(data) is False
        assert accel.is_zero(unaligned(bytes(data))) is False
        data[at] = 0
    assert accel.is_zero(data) is True


# ---- copy


@pytest.mark.parametrize("size", SIZES)
def test_copy(accel: Any, size: int) -> None:
    data = os.urandom(size)
    target = unaligned(bytes(size), 3)
    accel.copy(target, data)
    assert target == data


def test_copy_to_and_from_a_mapping(accel: Any) -> None:
    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as mapping:
        accel.copy(memoryview(mapping)[1:5], b"abcd")
        assert mapping[:6] == b"\0abcd\0"
        out = bytearray(3)
        accel.copy(out, memoryview(mapping)[2:5])
        assert out == b"bcd"


def test_copy_may_overlap(accel: Any) -> None:
    data = bytearray(range(100))
    view = memoryview(data)
    accel.copy(view[10:], view[:90])
    assert data == bytes(range(10)) + bytes(range(90))
    accel.copy(view[:90], view[10:])
    assert data == bytes(range(90)) + bytes(range(80, 90))


@pytest.mark.parametrize("name", ["copy", "bitmap_merge", "bitmap_and_not"])
@pytest.mark.parametrize(("into", "source"), [(4, 5), (5, 4), (0, 1), (1, 0)])
def test_lengths_must_agree(accel: Any, name: str, into: int, source: int) -> None:
    target = bytearray(into)
    with pytest.raises(ValueError, match=f"the destination has {into} bytes and the source {source}"):
        getattr(accel, name)(target, b"\xff" * source)
    assert target == bytes(into)


# ---- copies that are checked

BLOCK = 64 << 10
"""What the native twin copies before it looks at it."""

CHECKED_SIZES = [0, 1, 63, 64, 200, 240, 241, 255, 256, 257, 1024, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77, 1 << 20]


@pytest.mark.parametrize("size", CHECKED_SIZES)
@pytest.mark.parametrize("head", [b"", b"h", b"head" * 5, bytes(300), os.urandom(5000)], ids=len)
def test_copy_check(accel: Any, size: int, head: bytes) -> None:
    data = (b"\1" + os.urandom(size))[:size]
    for seed in (0, 1, U64_MAX):
        target = unaligned(bytes(size), 3)
        assert accel.copy_check(target, unaligned(data), head, seed) == xxh3(head + data, seed)
        assert target == data


@pytest.mark.parametrize("size", CHECKED_SIZES[1:])
def test_a_copy_of_zeros_has_no_check(accel: Any, size: int) -> None:
    target = bytearray(b"\xff" * size)
    assert accel.copy_check(target, bytes(size), b"head", 5) is None
    assert target == bytes(size)


def test_a_copy_of_nothing_has_the_check_of_its_head(accel: Any) -> None:
    assert accel.copy_check(bytearray(), b"", b"head", 5) == xxh3(b"head", 5)
    assert accel.copy_check(bytearray(), b"", b"", 0) == xxh3(b"", 0)


@pytest.mark.parametrize("size", [1, 64, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 9])
def test_zeros_before_and_after_other_bytes_count(accel: Any, size: int) -> None:
    for at in {0, size // 2, size - 1, min(BLOCK - 1, size - 1), min(BLOCK, size - 1)}:
        data = bytearray(size)
        data[at] = 1
        target = bytearray(b"\xff" * size)
        assert accel.copy_check(target, data, b"head", 5) == xxh3(b"head" + data, 5)
        assert target == data


def test_the_check_is_of_the_copy(accel: Any) -> None:
    """Memory that changes while it is read may be copied torn, but what is said of the copy is right."""
    size = 1 << 20
    values = [bytes([n]) * size for n in range(3)]
    copy, copy_check = accel.copy, accel.copy_check
    with mmap.mmap(-1, size) as live, memoryview(live) as source:
        done = threading.Event()

        def change() -> None:
            for value in itertools.cycle(values):
                copy(source, value)
                if done.is_set():
                    break

        changer = threading.Thread(target=change)
        changer.start()
        try:
            target = bytearray(size)
            for _ in range(200):
                check = copy_check(target, source, b"head", 5)
                assert check == (xxh3(b"head" + target, 5) if any(target) else None)
        finally:
            done.set()
            changer.join()


@pytest.mark.parametrize("seed", [-1, 2**64, 2**70])
def test_a_seed_is_64_bits(accel: Any, seed: int) -> None:
    target = bytearray(2 * PAGE)
    with pytest.raises(ValueError, match=f"a seed of {seed} is not an unsigned number of 64 bits"):
        accel.copy_check(target, b"\xff" * (2 * PAGE), b"", seed)
    with pytest.raises(ValueError, match=f"a seed of {seed} is not an unsigned number of 64 bits"):
        accel.gather_check(MEMORY, u64([1, 2]), 0, 0, target, PAGE, b"", seed)
    assert target == bytes(2 * PAGE)


# Blocks of zeros, of noise, and pieces of them: what is hashed at once and what is put off.
contents = st.lists(
    st.one_of(
        st.binary(max_size=400),
        st.tuples(
            st.sampled_from([b"\0", b"\0", b"\x01"]), st.sampled_from([1, 255, 4096, BLOCK - 1, BLOCK, 100_000])
        ).map(lambda p: p[0] * p[1]),
    ),
    max_size=5,
).map(b"".join)


@given(data=contents, head=st.binary(max_size=300), seed=st.integers(0, U64_MAX), shift=st.integers(0, 7))
def test_native_copy_check_is_as_pure(native: Any, data: bytes, head: bytes, seed: int, shift: int) -> None:
    results = []
    for twin in (native, _pure):
        target = unaligned(b"\x55" * len(data), 7 - shift)
        results.append((twin.copy_check(target, unaligned(data, shift), unaligned(head, 3), seed), bytes(target)))
    assert results[0] == results[1]


# ---- bitmaps


@pytest.mark.parametrize(
    ("bitmap", "bits", "runs"),
    [
        pytest.param(b"", 0, [], id="empty"),
        pytest.param(bytes(1000), 8000, [], id="none set"),
        pytest.param(b"\xff" * 1000, 8000, [0, 8000], id="all set"),
        pytest.param(b"\xff" * 1000, 7999, [0, 7999], id="all set, one bit less"),
        pytest.param(b"\xff" * 1000, 0, [], id="no bits asked for"),
        pytest.param(b"\x01", 1, [0, 1], id="one bit"),
        pytest.param(b"\x80", 7, [], id="set beyond the end"),
        pytest.param(b"\x80\x01", 16, [7, 2], id="over a byte"),
        pytest.param(bytes(7) + b"\x80\x01" + bytes(7), 128, [63, 2], id="over a word"),
        pytest.param(bytes(63) + b"\x80\x01" + bytes(63), 1024, [511, 2], id="over a block"),
        pytest.param(bytes(63) + b"\x80" + bytes(64), 1024, [511, 1], id="a run that ends with a block"),
        pytest.param(bytes(64) + b"\xff" * 64 + bytes(64), 1536, [512, 512], id="a block"),
        pytest.param(bytes(640) + b"\x10", 5125, [5124, 1], id="last bit"),
        pytest.param(bytes(640) + b"\x20", 5125, [], id="behind the last bit"),
        pytest.param(b"\xf0" + b"\xff" * 99 + b"\x0f", 808, [4, 800], id="one run of three stretches"),
        pytest.param(b"\xee" * 100, 800, [n for k in range(200) for n in (4 * k + 1, 3)], id="many runs"),
    ],
)
def test_runs_and_count(accel: Any, bitmap: bytes, bits: int, runs: list[int]) -> None:
    for view in (bitmap, unaligned(bitmap), unaligned(bitmap, 5)):
        found = accel.bitmap_runs(view, bits)
        assert isinstance(found, array)
        assert found.typecode == "Q"
        assert found.tolist() == runs
        assert accel.bitmap_count(view, bits) == sum(runs[1::2])


def test_a_bitmap_may_be_longer_than_its_bits(accel: Any) -> None:
    assert accel.bitmap_runs(b"\xff" * 100, 3).tolist() == [0, 3]
    assert accel.bitmap_count(b"\xff" * 100, 3) == 3


@pytest.mark.parametrize("name", ["bitmap_runs", "bitmap_count"])
@pytest.mark.parametrize(
    ("size", "bits"), [(0, 1), (1, 9), (8, 65), (1, -1), (1, 2**63), (1, 2**64 + 1), (1, -(2**64))]
)
def test_bits_must_be_in_the_bitmap(accel: Any, name: str, size: int, bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits are not in a bitmap of {size} bytes"):
        getattr(accel, name)(bytes(size), bits)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 1001])
def test_merge(accel: Any, size: int) -> None:
    old, new = os.urandom(size), os.urandom(size)
    target = unaligned(old, 3)
    accel.bitmap_merge(target, unaligned(new))
    assert target == bytes(a | b for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 1001])
def test_and_not(accel: Any, size: int) -> None:
    old, new = os.urandom(size), os.urandom(size)
    target = unaligned(old, 3)
    accel.bitmap_and_not(target, unaligned(new))
    assert target == bytes(a & ~b & 0xFF for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize(
    ("gap", "runs"),
    [
        (0, [2, 2, 5, 1, 8, 2, 90, 10]),
        (1, [2, 4, 8, 2, 90, 10]),
        (2, [2, 8, 90, 10]),
        (79, [2, 8, 90, 10]),
        (80, [2, 98]),
        (2**64, [2, 98]),
    ],
)
def test_runs_with_a_small_gap_become_one(accel: Any, gap: int, runs: list[int]) -> None:
    bitmap = sum(1 << n for n in (2, 3, 5, 8, 9, *range(90, 100))).to_bytes(20, "little")
    assert accel.bitmap_runs(bitmap, 160, gap).tolist() == runs


def test_a_gap_is_not_negative(accel: Any) -> None:
    with pytest.raises(ValueError, match="a gap of -1 bits is less than none"):
        accel.bitmap_runs(b"\x05", 8, -1)


@pytest.mark.parametrize("gap", [0, 1, 2, 100])
def test_more_runs_than_are_expected(accel: Any, gap: int) -> None:
    """Enough of them that the array they are put in has to grow, several times."""
    bitmap = b"\x55" * 100_000
    runs = accel.bitmap_runs(bitmap, 800_000, gap)
    assert runs == (u64([0, 799_999]) if gap else u64(n for k in range(400_000) for n in (2 * k, 1)))


@pytest.mark.parametrize(
    ("first", "bits", "out"),
    [
        (0, 32, b"\x01\x80\xff\x0f"),
        (0, 20, b"\x01\x80\x0f"),
        (8, 16, b"\x80\xff"),
        (15, 9, b"\xff\x01"),
        (15, 17, b"\xff\x1f\x00"),
        (31, 1, b"\x00"),
        (27, 1, b"\x01"),
        (32, 0, b""),
        (3, 0, b""),
    ],
)
def test_extract(accel: Any, first: int, bits: int, out: bytes) -> None:
    target = unaligned(b"\xaa" * len(out))
    accel.bitmap_extract(unaligned(b"\x01\x80\xff\x0f"), first, bits, target)
    assert target == out


@pytest.mark.parametrize(
    ("first", "bits"), [(0, 33), (32, 1), (33, 0), (1, 32), (-1, 4), (4, -1), (2**64, 1), (1, 2**64), (2**63, 2**63)]
)
def test_what_is_extracted_must_be_in_the_bitmap(accel: Any, first: int, bits: int) -> None:
    target = bytearray(b"\xaa" * 5)
    with pytest.raises(ValueError, match=f"{bits} bits from bit {first} on are not in a bitmap of 4 bytes"):
        accel.bitmap_extract(b"\xff" * 4, first, bits, target)
    assert target == b"\xaa" * 5


@pytest.mark.parametrize("size", [0, 1, 3])
def test_what_is_extracted_must_fill_the_output(accel: Any, size: int) -> None:
    target = bytearray(b"\xaa" * size)
    with pytest.raises(ValueError, match=f"9 bits do not fill {size} bytes"):
        accel.bitmap_extract(b"\xff" * 4, 1, 9, target)
    assert target == b"\xaa" * size


# Long stretches of one byte matter as much as noise: they are where the twins take short cuts.
bitmaps = st.lists(
    st.one_of(
        st.binary(max_size=70),
        st.tuples(st.sampled_from([b"\0", b"\xff", b"\x55", b"\x80"]), st.integers(1, 140)).map(lambda p: p[0] * p[1]),
    ),
    max_size=6,
).map(b"".join)


@given(bitmaps, st.integers(0, 7), st.integers(0, 7))
def test_pure_finds_the_runs_there_are(bitmap: bytes, cut: int, shift: int) -> None:
    bits = max(0, 8 * len(bitmap) - cut)
    runs = _pure.bitmap_runs(unaligned(bitmap, shift), bits).tolist()
    assert runs == slow_runs(bitmap, bits)
    assert _pure.bitmap_count(bitmap, bits) == sum(runs[1::2])


@given(bitmap=bitmaps, cut=st.integers(0, 600), shift=st.integers(0, 7))
def test_native_bitmaps_are_as_pure(native: Any, bitmap: bytes, cut: int, shift: int) -> None:
    bits = max(0, 8 * len(bitmap) - cut)
    view = unaligned(bitmap, shift)
    assert native.bitmap_runs(view, bits) == _pure.bitmap_runs(view, bits)
    assert native.bitmap_count(view, bits) == _pure.bitmap_count(view, bits)
    assert native.is_zero(view) == _pure.is_zero(view)


@given(bitmap=bitmaps, gap=st.integers(0, 700))
def test_runs_with_a_gap_are_those_without_joined(bitmap: bytes, gap: int) -> None:
    joined: list[int] = []
    alone = _pure.bitmap_runs(bitmap, 8 * len(bitmap)).tolist()
    for first, count in zip(alone[::2], alone[1::2], strict=True):
        if joined and first - sum(joined[-2:]) <= gap:
            joined[-1] = first + count - joined[-2]
        else:
            joined += [first, count]
    assert _pure.bitmap_runs(bitmap, 8 * len(bitmap), gap).tolist() == joined


@given(bitmap=bitmaps, cut=st.integers(0, 70), gap=st.sampled_from([1, 2, 7, 63, 64, 65, 511, 512, 513, 5000]))
def test_native_runs_with_a_gap_are_as_pure(native: Any, bitmap: bytes, cut: int, gap: int) -> None:
    bits = max(0, 8 * len(bitmap) - cut)
    assert native.bitmap_runs(bitmap, bits, gap) == _pure.bitmap_runs(bitmap, bits, gap)


def noise(seed: int, size: int, thinned: int) -> bytes:
    """Random bits, of which each thinning leaves half."""
    source = random.Random(seed)
    bits = source.getrandbits(8 * size)
    for _ in range(thinned):
        bits &= source.getrandbits(8 * size)
    return bits.to_bytes(size, "little")


@given(seed=st.integers(0, 2**32), thinned=st.integers(0, 6), gap=st.integers(0, 70))
def test_native_finds_the_runs_of_noise_as_pure(native: Any, seed: int, thinned: int, gap: int) -> None:
    bitmap = noise(seed, 10_000, thinned)
    assert native.bitmap_runs(bitmap, 79_993, gap) == _pure.bitmap_runs(bitmap, 79_993, gap)


@pytest.mark.parametrize("last", range(16_370, 16_450, 10))
def test_native_finds_the_last_run_where_room_ends(native: Any, last: int) -> None:
    bitmap = bytes((1 << 19) + 61 - last % 64) + b"\x55" * last
    bits = 8 * len(bitmap)
    assert native.bitmap_runs(bitmap, bits) == _pure.bitmap_runs(bitmap, bits)


@pytest.mark.parametrize("gap", [0, 1, 5])
@pytest.mark.parametrize("quiet", [0, 60_000])
def test_native_finds_the_runs_of_much_noise_as_pure(native: Any, gap: int, quiet: int) -> None:
    """So many that what is left is counted on the way."""
    bitmap = noise(1, 90_001, 0) + bytes(quiet) + noise(2, 90_000, 1)
    bits = 8 * len(bitmap) - 3
    assert native.bitmap_runs(bitmap, bits, gap) == _pure.bitmap_runs(bitmap, bits, gap)


@given(data=st.data())
def test_native_merge_and_difference_are_as_pure(native: Any, data: st.DataObject) -> None:
    old = data.draw(bitmaps)
    new = data.draw(st.binary(min_size=len(old), max_size=len(old)))
    results = []
    for twin in (native, _pure):
        merged, left = unaligned(old), unaligned(old)
        twin.bitmap_merge(merged, new)
        twin.bitmap_and_not(left, new)
        results.append((bytes(merged), bytes(left)))
    assert results[0] == results[1]


@given(bitmap=bitmaps, first=st.integers(0, 2000), bits=st.integers(0, 2000))
def test_native_extract_is_as_pure(native: Any, bitmap: bytes, first: int, bits: int) -> None:
    first = min(first, 8 * len(bitmap))
    bits = min(bits, 8 * len(bitmap) - first)
    results = []
    for twin in (native, _pure):
        out = unaligned(b"\xaa" * ((bits + 7) // 8), 3)
        twin.bitmap_extract(unaligned(bitmap), first, bits, out)
        results.append(bytes(out))
    assert results[0] == results[1]
    restricted = [n - first for n in range(first, first + bits) if bitmap[n // 8] >> n % 8 & 1]
    assert results[0] == sum(1 << n for n in restricted).to_bytes((bits + 7) // 8, "little")


# ---- gather and scatter

MEMORY = b"".join(bytes([page]) * PAGE for page in range(100))


def pages(*numbers: int) -> bytes:
    return b"".join(bytes([number]) * PAGE for number in numbers)


def test_gather_all_at_once(accel: Any) -> None:
    out = bytearray(6 * PAGE)
    assert accel.gather(MEMORY, u64([3, 2, 99, 1, 10, 3]), 0, 0, out, PAGE) == (6 * PAGE, 3, 0)
    assert out == pages(3, 4, 99, 10, 11, 12)


def test_gather_stops_where_no_whole_page_fits(accel: Any) -> None:
    runs = u64([3, 2, 10, 3])
    out = bytearray(4 * PAGE - 1)
    assert accel.gather(MEMORY, runs, 0, 0, out, PAGE) == (3 * PAGE, 1, 1)
    assert out == pages(3, 4, 10) + bytes(PAGE - 1)
    assert accel.gather(MEMORY, runs, 1, 1, out, PAGE) == (2 * PAGE, 2, 0)
    assert out[: 2 * PAGE] == pages(11, 12)
    assert accel.gather(MEMORY, runs, 2, 0, out, PAGE) == (0, 2, 0)


def test_gather_ends_on_a_run(accel: Any) -> None:
    out = bytearray(2 * PAGE)
    assert accel.gather(MEMORY, u64([3, 2, 10, 3]), 0, 0, out, PAGE) == (2 * PAGE, 1, 0)


@pytest.mark.parametrize("room", [0, PAGE - 1])
def test_gather_without_room(accel: Any, room: int) -> None:
    out = bytearray(room)
    assert accel.gather(MEMORY, u64([3, 2]), 0, 1, out, PAGE) == (0, 0, 1)
    assert out == bytes(room)


def test_gather_takes_empty_runs_in_its_stride(accel: Any) -> None:
    out = bytearray(2 * PAGE)
    assert accel.gather(MEMORY, u64([5, 0, 7, 1, 100, 0, 8, 1]), 0, 0, out, PAGE) == (2 * PAGE, 4, 0)
    assert out == pages(7, 8)


def test_gather_from_the_end_of_a_run(accel: Any) -> None:
    out = bytearray(PAGE)
    assert accel.gather(MEMORY, u64([3, 2, 9, 1]), 0, 2, out, PAGE) == (PAGE, 2, 0)
    assert out == pages(9)


def test_runs_may_be_any_buffer_of_u64(accel: Any) -> None:
    out = bytearray(PAGE)
    view = unaligned(u64([3, 1]).tobytes())
    assert accel.gather(MEMORY, view, 0, 0, out, PAGE) == (PAGE, 1, 0)
    assert out == pages(3)


def test_a_partial_last_page_of_memory_is_out_of_reach(accel: Any) -> None:
    out = bytearray(PAGE)
    with pytest.raises(ValueError, match="run 0 does not lie in the memory of 9 pages"):
        accel.gather(MEMORY[: 10 * PAGE - 1], u64([9, 1]), 0, 0, out, PAGE)
    with pytest.raises(ValueError, match="run 0 does not lie in the memory of 9 pages"):
        accel.scatter(bytearray(10 * PAGE - 1), u64([9, 1]), 0, 0, out, PAGE)


def test_gather_check(accel: Any) -> None:
    runs = u64([3, 2, 10, 3])
    out = bytearray(4 * PAGE - 1)
    head = b"head"
    check = xxh3(head + pages(3, 4, 10), 5)
    assert accel.gather_check(MEMORY, runs, 0, 0, out, PAGE, head, 5) == (3 * PAGE, 1, 1, check)
    assert out == pages(3, 4, 10) + bytes(PAGE - 1)
    check = xxh3(head + pages(11, 12), 5)
    assert accel.gather_check(MEMORY, runs, 1, 1, out, PAGE, head, 5) == (2 * PAGE, 2, 0, check)
    assert accel.gather_check(MEMORY, runs, 2, 0, out, PAGE, head, 5) == (0, 2, 0, xxh3(head, 5))


def test_gathered_zeros_have_no_check(accel: Any) -> None:
    out = bytearray(b"\xff" * 4 * PAGE)
    assert accel.gather_check(bytes(9 * PAGE), u64([3, 2, 8, 1]), 0, 0, out, PAGE, b"head", 5) == (3 * PAGE, 2, 0, None)
    assert out == bytes(3 * PAGE) + b"\xff" * PAGE


def test_gathered_zeros_before_and_after_other_pages_count(accel: Any) -> None:
    page = 4096
    memory = bytearray(64 * page)
    memory[40 * page] = 1
    for runs in (u64([0, 64]), u64([40, 9, 0, 30]), u64([0, 20, 40, 1]), u64([0, 1, 40, 1]), u64([0, 50, 1, 3])):
        out = bytearray(64 * page)
        filled, *_, check = accel.gather_check(memory, runs, 0, 0, out, page, b"head", 5)
        assert check == xxh3(b"head" + out[:filled], 5)
        assert 1 in out


def test_scatter_in_pieces(accel: Any) -> None:
    runs = u64([3, 2, 99, 1, 10, 3])
    memory = bytearray(MEMORY)
    assert accel.scatter(memory, runs, 0, 0, pages(200), PAGE) == (0, 1)
    assert accel.scatter(memory, runs, 0, 1, pages(201, 202, 203), PAGE) == (2, 1)
    assert accel.scatter(memory, runs, 2, 1, b"", PAGE) == (2, 1)
    assert accel.scatter(memory, runs, 2, 1, pages(204, 205), PAGE) == (3, 0)
    assert accel.scatter(memory, runs, 3, 0, b"", PAGE) == (3, 0)
    expected = bytearray(MEMORY)
    for page, value in {3: 200, 4: 201, 99: 202, 10: 203, 11: 204, 12: 205}.items():
        expected[page * PAGE : (page + 1) * PAGE] = pages(value)
    assert memory == expected


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE + 1])
def test_scatter_wants_whole_pages(accel: Any, size: int) -> None:
    memory = bytearray(MEMORY)
    with pytest.raises(ValueError, match=f"{size} bytes are not a whole number of pages of {PAGE} bytes"):
        accel.scatter(memory, u64([3, 2]), 0, 0, b"\xff" * size, PAGE)
    assert memory == MEMORY


def test_scatter_refuses_more_than_the_runs_have(accel: Any) -> None:
    memory = bytearray(MEMORY)
    with pytest.raises(ValueError, match="3 pages are more than the runs have left"):
        accel.scatter(memory, u64([3, 2, 9, 1]), 0, 1, pages(200, 201, 202), PAGE)
    assert memory == MEMORY


BAD_RUNS = [
    [0, 101],
    [99, 2],
    [100, 1],
    [101, 0],
    [50, U64_MAX],
    [U64_MAX, 1],
    [U64_MAX, 2],
    [U64_MAX, U64_MAX],
    [2**63, 2**63],
    # First page and count times the size of a page are small modulo 2**64.
    [2**64 // PAGE, 1],
    [1, 2**64 // PAGE],
    [U64_MAX // PAGE + 2, 1],
]


@pytest.mark.parametrize("bad", BAD_RUNS, ids=str)
def test_a_run_outside_memory_is_refused_before_anything_is_copied(accel: Any, bad: list[int]) -> None:
    runs = u64([3, 2, *bad])
    out = bytearray(4 * PAGE)
    with pytest.raises(ValueError, match="run 1 does not lie in the memory of 100 pages"):
        accel.gather(MEMORY, runs, 0, 0, out, PAGE)
    assert out == bytes(4 * PAGE)
    memory = bytearray(MEMORY)
    with pytest.raises(ValueError, match="run 1 does not lie in the memory of 100 pages"):
        accel.scatter(memory, runs, 0, 0, b"\xff" * (4 * PAGE), PAGE)
    assert memory == MEMORY


def test_a_skip_into_a_run_outside_memory_is_refused(accel: Any) -> None:
    with pytest.raises(ValueError, match="run 0 does not lie"):
        accel.gather(MEMORY, u64([50, U64_MAX]), 0, U64_MAX - 10, bytearray(PAGE), PAGE)


@pytest.mark.parametrize(
    ("index", "skip"), [(0, 3), (2, 1), (3, 0), (-1, 0), (0, -1), (2**63, 0), (2**64, 0), (0, 2**64), (-(2**64), 0)]
)
def test_a_start_outside_the_runs_is_refused(accel: Any, index: int, skip: int) -> None:
    runs = u64([3, 2, 9, 1])
    with pytest.raises(ValueError, match=f"page {skip} of run {index} is not in the 2 runs"):
        accel.gather(MEMORY, runs, index, skip, bytearray(PAGE), PAGE)
    with pytest.raises(ValueError, match=f"page {skip} of run {index} is not in the 2 runs"):
        accel.scatter(bytearray(MEMORY), runs, index, skip, bytes(PAGE), PAGE)


@pytest.mark.parametrize("page_size", [0, -1, -PAGE, 2**63, 2**64 + PAGE])
def test_bad_page_sizes_are_refused(accel: Any, page_size: int) -> None:
    with pytest.raises(ValueError, match=f"{page_size} bytes is not the size of a page"):
        accel.gather(MEMORY, u64([3, 1]), 0, 0, bytearray(PAGE), page_size)
    with pytest.raises(ValueError, match=f"{page_size} bytes is not the size of a page"):
        accel.scatter(bytearray(MEMORY), u64([3, 1]), 0, 0, bytes(PAGE), page_size)


def test_a_page_larger_than_everything_is_no_page(accel: Any) -> None:
    assert accel.gather(MEMORY, u64([0, 1]), 0, 0, bytearray(PAGE), sys.maxsize) == (0, 0, 0)


@pytest.mark.parametrize("size", [1, 8, 15, 24])
def test_runs_must_be_pairs(accel: Any, size: int) -> None:
    with pytest.raises(ValueError, match=f"runs of {size} bytes are not pairs of 64-bit numbers"):
        accel.gather(MEMORY, bytes(size), 0, 0, bytearray(PAGE), PAGE)
    with pytest.raises(ValueError, match=f"runs of {size} bytes are not pairs of 64-bit numbers"):
        accel.scatter(bytearray(MEMORY), bytes(size), 0, 0, bytes(PAGE), PAGE)


# Mostly runs that lie in memory; some that don't, and some numbers that overflow sums.
numbers = st.one_of(
    st.integers(0, 20), st.integers(0, 120), st.sampled_from([2**63, 2**64 // PAGE, U64_MAX - 1, U64_MAX])
)
run_lists = st.one_of(
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 20)), max_size=8),
    st.lists(st.tuples(numbers, numbers), max_size=8),
).map(lambda pairs: u64(n for pair in pairs for n in pair))


def outcome(function: Any, *arguments: Any) -> Any:
    """What a call returns, or what it raises, to be compared."""
    try:
        return function(*arguments)
    except (ValueError, OverflowError) as error:
        return type(error), str(error)


@given(
    runs=run_lists,
    index=st.integers(-1, 9),
    skip=st.one_of(st.just(0), st.integers(0, 25), numbers),
    room=st.integers(0, 30 * PAGE),
    page_size=st.sampled_from([1, 7, PAGE, 2 * PAGE]),
)
def test_native_gather_and_scatter_are_as_pure(
    native: Any, runs: array[int], index: int, skip: int, room: int, page_size: int
) -> None:
    gathered, checked, scattered = [], [], []
    data = (bytes(range(251)) * 8)[:room]
    for twin in (native, _pure):
        out = bytearray(room)
        gathered.append((outcome(twin.gather, MEMORY, runs, index, skip, out, page_size), out))
        out = bytearray(room)
        gather_check = partial(twin.gather_check, MEMORY, runs, index, skip, out, page_size)
        checked.append((outcome(gather_check, b"head", 5), out))
        memory = bytearray(MEMORY)
        scattered.append((outcome(twin.scatter, memory, runs, index, skip, data, page_size), memory))
    assert gathered[0] == gathered[1]
    assert checked[0] == checked[1]
    assert scattered[0] == scattered[1]


@given(bitmap=st.binary(min_size=12, max_size=12), room=st.integers(1, 20))
def test_what_is_gathered_in_pieces_is_scattered_back(native: Any, bitmap: bytes, room: int) -> None:
    for here, there in [(native, _pure), (_pure, native)]:
        runs = here.bitmap_runs(bitmap, 96)
        memory = bytearray(len(MEMORY))
        out = bytearray(room * PAGE)
        source, target = (0, 0), (0, 0)
        while source[0] < len(runs) // 2:
            filled, *cursor = here.gather(MEMORY, runs, *source, out, PAGE)
            source = (cursor[0], cursor[1])
            target = there.scatter(memory, runs, *target, memoryview(out)[:filled], PAGE)
            assert target == source
        for page in range(100):
            set_ = page < 96 and bitmap[page // 8] >> page % 8 & 1
            assert memory[page * PAGE : (page + 1) * PAGE] == (pages(page) if set_ else bytes(PAGE))


# ---- buffers of the wrong kind


def calls_with(accel: Any, readable: Any, writable: Any) -> list[Any]:
    """Every call that takes a buffer of 64 bytes to read, then every one that takes one to write to."""
    runs = u64([0, 1])
    calls = []
    if readable is not None:
        calls += [
            lambda: accel.is_zero(readable),
            lambda: accel.copy(bytearray(PAGE), readable),
            lambda: accel.copy_check(bytearray(PAGE), readable, b"", 0),
            lambda: accel.copy_check(bytearray(PAGE), bytes(PAGE), readable, 0),
            lambda: accel.bitmap_runs(readable, 1),
            lambda: accel.bitmap_merge(bytearray(PAGE), readable),
            lambda: accel.bitmap_and_not(bytearray(PAGE), readable),
            lambda: accel.bitmap_extract(readable, 0, 8, bytearray(1)),
            lambda: accel.bitmap_count(readable, 1),
            lambda: accel.gather(readable, runs, 0, 0, bytearray(PAGE), PAGE),
            lambda: accel.gather(MEMORY, readable, 0, 0, bytearray(), PAGE),
            lambda: accel.gather_check(readable, runs, 0, 0, bytearray(PAGE), PAGE, b"", 0),
            lambda: accel.gather_check(MEMORY, readable, 0, 0, bytearray(), PAGE, b"", 0),
            lambda: accel.gather_check(MEMORY, runs, 0, 0, bytearray(PAGE), PAGE, readable, 0),
            lambda: accel.scatter(bytearray(PAGE), runs, 0, 0, readable, PAGE),
            lambda: accel.scatter(bytearray(PAGE), readable, 0, 0, b"", PAGE),
        ]
    if writable is not None:
        calls += [
            lambda: accel.copy(writable, bytes(PAGE)),
            lambda: accel.copy_check(writable, bytes(PAGE), b"", 0),
            lambda: accel.bitmap_merge(writable, bytes(PAGE)),
            lambda: accel.bitmap_and_not(writable, bytes(PAGE)),
            lambda: accel.bitmap_extract(bytes(PAGE), 0, 8 * PAGE, writable),
            lambda: accel.gather(MEMORY, runs, 0, 0, writable, PAGE),
            lambda: accel.gather_check(MEMORY, runs, 0, 0, writable, PAGE, b"", 0),
            lambda: accel.scatter(writable, runs, 0, 0, bytes(PAGE), PAGE),
        ]
    return calls


def test_a_buffer_that_is_written_to_must_be_writable(accel: Any) -> None:
    readonly = bytes(PAGE)
    for buffer in (readonly, memoryview(readonly), memoryview(bytearray(PAGE)).toreadonly()):
        for call in calls_with(accel, readable=None, writable=buffer):
            with pytest.raises(BufferError):
                call()


def test_a_buffer_must_be_contiguous(accel: Any) -> None:
    every_other = memoryview(bytearray(2 * PAGE))[::2]
    for call in calls_with(accel, readable=every_other, writable=every_other):
        with pytest.raises(BufferError):
            call()


@pytest.mark.parametrize("thing", ["text", 5, [1, 2]], ids=repr)
def test_what_is_not_a_buffer_is_a_type_error(accel: Any, thing: object) -> None:
    for call in calls_with(accel, readable=thing, writable=thing):
        with pytest.raises(TypeError):
            call()


def test_a_buffer_of_another_format_is_taken_as_bytes(accel: Any) -> None:
    words = memoryview(u64(range(8)))
    for call in calls_with(accel, readable=words, writable=words):
        call()


def test_no_buffer_is_kept(accel: Any) -> None:
    buffer = bytearray(PAGE)
    for call in calls_with(accel, readable=buffer, writable=buffer):
        call()
    with pytest.raises(ValueError, match="destination"):
        accel.copy(buffer, b"")
    buffer.append(0)  # A BufferError while anybody holds it.


# ---- pages that are zeros


@given(st.lists(st.booleans(), max_size=40), st.integers(0, PAGE - 1))
def test_pages_that_are_not_zeros(native: Any, used: list[bool], where: int) -> None:
    data = b"".join(bytes(where) + b"\x01" + bytes(PAGE - 1 - where) if one else bytes(PAGE) for one in used)
    for twin in (native, _pure):
        bitmap = bytearray(b"\xff" * ((len(used) + 7) // 8))
        assert twin.nonzero_pages(unaligned(data), PAGE, bitmap) == sum(used)
        assert int.from_bytes(bitmap, "little") == sum(one << n for n, one in enumerate(used))


@pytest.mark.parametrize(("size", "page", "bitmap"), [(65, 64, 1), (64, 64, 0), (64, 64, 2), (64, 0, 1)])
def test_pages_and_their_bitmap_must_fit(accel: Any, size: int, page: int, bitmap: int) -> None:
    with pytest.raises(ValueError, match="page"):
        accel.nonzero_pages(bytes(size), page, bytearray(bitmap))
