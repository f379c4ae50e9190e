"""The twin in plain Python: what each function means, and the oracle the native twin is tested against.

Bytes are handled in blocks by what CPython does in C (slices, big integers, regular expressions), never one at a time.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterator

import xxhash

from vfiostream.buffers import Buffer

_ZEROS = bytes(1 << 16)

# A bitmap cut into stretches: no bit set, all bits set, and the rest, which is cut short as picking a run out of an
# integer costs the length of the integer. Matching zeros is ten times faster than searching for what follows them.
_STRETCHES = re.compile(rb"\x00+|\xff+|[^\x00\xff]{1,32}")


def is_zero(data: Buffer) -> bool:
    """Say whether every byte of ``data`` is zero; so it is when it is empty."""
    view = _readable(data)
    for start in range(0, len(view), len(_ZEROS)):
        block = view[start : start + len(_ZEROS)]
        # As bytes: memoryviews are compared item by item.
        if bytes(block) != _ZEROS[: len(block)]:
            return False
    return True


def nonzero_pages(data: Buffer, page_size: int, bitmap: bytearray | memoryview) -> int:
    """Set bit n of ``bitmap`` where page n of ``data`` (whole pages) has a byte that is not zero, clear the others, and
    return how many are set.
    """
    view, found = _readable(data), _writable(bitmap)
    pages, rest = divmod(len(view), _checked_page_size(page_size))
    if rest or len(found) != (pages + 7) // 8:
        raise ValueError(
            f"a bitmap of {len(found)} bytes is not one of the {page_size} byte pages of {len(view)} bytes"
        )
    bits = [not is_zero(view[n * page_size : (n + 1) * page_size]) for n in range(pages)]
    found[:] = sum(bit << n for n, bit in enumerate(bits)).to_bytes(len(found), "little")
    return sum(bits)


def copy(dst: bytearray | memoryview, src: Buffer) -> None:
    """Copy ``src`` to ``dst``, which is as long; they may overlap."""
    target, source = _writable(dst), _readable(src)
    _check_same_length(target, source)
    target[:] = source


def copy_check(dst: bytearray | memoryview, src: Buffer, head: Buffer, seed: int) -> int | None:
    """Copy ``src`` to ``dst``, which is as long, and return the XXH3-64 of ``head`` and the copy.

    Where there is something to copy and all of it is zero, the result is None; ``dst`` is written all the same.
    ``seed`` is an unsigned number of 64 bits. ``src`` may be memory that others write to meanwhile: what is said of the
    bytes is said of those in ``dst``. ``src`` and ``dst`` do not overlap.
    """
    target, source, above = _writable(dst), _readable(src), _readable(head)
    _check_seed(seed)
    _check_same_length(target, source)
    target[:] = source
    return _check_of(target, above, seed)


def _check_of(content: memoryview, head: memoryview, seed: int) -> int | None:
    if content and is_zero(content):
        return None
    digest = xxhash.xxh3_64(head, seed)
    digest.update(content)
    return digest.intdigest()


def bitmap_runs(bitmap: Buffer, bits: int, gap: int = 0) -> array[int]:
    """Find the runs of set bits among the first ``bits`` of ``bitmap``.

    Bit n is bit ``n % 8`` of byte ``n // 8``. Returns ``array("Q", [first, count, first, count...])``, ascending; each
    run is as long as can be. Runs with at most ``gap`` clean bits between them become one, clean bits included.
    """
    view = _readable(bitmap)
    _check_bits(view, bits)
    if gap < 0:
        raise ValueError(f"a gap of {gap} bits is less than none")
    runs = array("Q")
    first = end = 0  # Of the run at hand, which the next piece may continue.
    for start, count in _pieces_of_runs(view, bits):
        if end == first or start - end > gap:
            if end > first:
                runs.extend((first, end - first))
            first = start
        end = start + count
    if end > first:
        runs.extend((first, end - first))
    return runs


def _pieces_of_runs(bitmap: memoryview, bits: int) -> Iterator[tuple[int, int]]:
    whole, rest = divmod(bits, 8)
    for match in _STRETCHES.finditer(bitmap[:whole]):
        start, stop = match.span()
        if bitmap[start] == 0xFF:
            yield 8 * start, 8 * (stop - start)
        elif bitmap[start]:
            yield from _runs_of_integer(int.from_bytes(bitmap[start:stop], "little"), 8 * start)
    if rest:
        yield from _runs_of_integer(bitmap[whole] & ((1 << rest) - 1), 8 * whole)


def _runs_of_integer(value: int, base: int) -> Iterator[tuple[int, int]]:
    while value:
        gap = (value & -value).bit_length() - 1
        value >>= gap
        count = (~value & (value + 1)).bit_length() - 1
        value >>= count
        yield base + gap, count
        base += gap + count


def bitmap_merge(dst: bytearray | memoryview, src: Buffer) -> None:
    """Set in ``dst`` every bit that is set in ``src``, which is as long."""
    target, source = _writable(dst), _readable(src)
    _check_same_length(target, source)
    merged = int.from_bytes(target, "little") | int.from_bytes(source, "little")
    target[:] = merged.to_bytes(len(target), "little")


def bitmap_and_not(dst: bytearray | memoryview, src: Buffer) -> None:
    """Clear in ``dst`` every bit that is set in ``src``, which is as long."""
    target, source = _writable(dst), _readable(src)
    _check_same_length(target, source)
    left = int.from_bytes(target, "little") & ~int.from_bytes(source, "little")
    target[:] = left.to_bytes(len(target), "little")


def bitmap_extract(bitmap: Buffer, first: int, bits: int, out: bytearray | memoryview) -> None:
    """Write the ``bits`` bits of ``bitmap`` from ``first`` on to ``out``, of which they become bit 0 and up.

    ``out`` is as long as they need; what is left of its last byte is cleared. ``bitmap`` and ``out`` do not overlap.
    """
    source, target = _readable(bitmap), _writable(out)
    if not 0 <= first <= 8 * len(source) or not 0 <= bits <= 8 * len(source) - first:
        raise ValueError(f"{bits} bits from bit {first} on are not in a bitmap of {len(source)} bytes")
    if len(target) != (bits + 7) // 8:
        raise ValueError(f"{bits} bits do not fill {len(target)} bytes")
    read = int.from_bytes(source[first // 8 : (first + bits + 7) // 8], "little") >> first % 8
    target[:] = (read & ((1 << bits) - 1)).to_bytes(len(target), "little")


def bitmap_count(bitmap: Buffer, bits: int) -> int:
    """Count the set bits among the first ``bits`` of ``bitmap``."""
    view = _readable(bitmap)
    _check_bits(view, bits)
    whole, rest = divmod(bits, 8)
    count = int.from_bytes(view[:whole], "little").bit_count()
    if rest:
        count += (view[whole] & ((1 << rest) - 1)).bit_count()
    return count


def gather(
    memory: Buffer,
    runs: array[int] | Buffer,
    index: int,
    skip: int,
    out: bytearray | memoryview,
    page_size: int,
) -> tuple[int, int, int]:
    """Copy pages of ``memory`` to ``out``, those that ``runs`` names, in that order and without gaps.

    ``runs`` are native 64-bit numbers as :func:`bitmap_runs` gives them, in pages of ``page_size`` bytes. The work
    starts ``skip`` pages into run number ``index`` and ends with the runs, or when ``out`` has no room for one more
    page. Returns the bytes copied, and the index and skip to go on with; once all runs that are not empty are done, the
    index is their number and the skip is 0.

    A run of those to be copied that leaves the whole pages of ``memory`` is a ``ValueError``, as is a start outside the
    runs. ``memory`` and ``out`` do not overlap.
    """
    source, target = _readable(memory), _writable(out)
    room = len(target) // _checked_page_size(page_size)
    spans, index, skip = _plan(runs, index, skip, room, len(source) // page_size)
    filled = 0
    for first, count in spans:
        size = count * page_size
        target[filled : filled + size] = source[first * page_size : first * page_size + size]
        filled += size
    return filled, index, skip


def gather_check(
    memory: Buffer,
    runs: array[int] | Buffer,
    index: int,
    skip: int,
    out: bytearray | memoryview,
    page_size: int,
    head: Buffer,
    seed: int,
) -> tuple[int, int, int, int | None]:
    """:func:`gather`, and with it what :func:`copy_check` returns for ``head`` and the bytes copied."""
    target, above = _writable(out), _readable(head)
    _check_seed(seed)
    filled, index, skip = gather(memory, runs, index, skip, target, page_size)
    return filled, index, skip, _check_of(target[:filled], above, seed)


def scatter(
    memory: bytearray | memoryview,
    runs: array[int] | Buffer,
    index: int,
    skip: int,
    data: Buffer,
    page_size: int,
) -> tuple[int, int]:
    """Copy the pages of ``data`` to the pages of ``memory`` that ``runs`` names; the reverse of :func:`gather`.

    Returns the index and skip to go on with. Beside what :func:`gather` raises, ``data`` that is not whole pages, or is
    more than the runs have left, is a ``ValueError``.
    """
    target, source = _writable(memory), _readable(data)
    pages, rest = divmod(len(source), _checked_page_size(page_size))
    if rest:
        raise ValueError(f"{len(source)} bytes are not a whole number of pages of {page_size} bytes")
    spans, index, skip = _plan(runs, index, skip, pages, len(target) // page_size)
    if sum(count for _, count in spans) < pages:
        raise ValueError(f"{pages} pages are more than the runs have left")
    done = 0
    for first, count in spans:
        size = count * page_size
        target[first * page_size : first * page_size + size] = source[done : done + size]
        done += size
    return index, skip


def _plan(
    runs: array[int] | Buffer, index: int, skip: int, room: int, memory_pages: int
) -> tuple[list[tuple[int, int]], int, int]:
    """Cut the next ``room`` pages from ``runs``: (first page, count) of each span, and the cursor behind them."""
    as_bytes = _readable(runs)
    if len(as_bytes) % 16:
        raise ValueError(f"runs of {len(as_bytes)} bytes are not pairs of 64-bit numbers")
    numbers = as_bytes.cast("Q")
    total = len(numbers) // 2
    if not 0 <= index <= total or not 0 <= skip <= (numbers[2 * index + 1] if index < total else 0):
        raise ValueError(f"page {skip} of run {index} is not in the {total} runs")
    spans = []
    while room and index < total:
        first, count = numbers[2 * index], numbers[2 * index + 1]
        if first + count > memory_pages:
            raise ValueError(f"run {index} does not lie in the memory of {memory_pages} pages")
        taken = min(count - skip, room)
        spans.append((first + skip, taken))
        room -= taken
        skip += taken
        if skip == count:
            index, skip = index + 1, 0
    return spans, index, skip


def _readable(data: array[int] | Buffer) -> memoryview:
    view = memoryview(data)
    if not view.c_contiguous:
        raise BufferError("the buffer is not contiguous")
    return view.cast("B")


def _writable(data: bytearray | memoryview) -> memoryview:
    view = _readable(data)
    if view.readonly:
        raise BufferError("the buffer is read only")
    return view


def _check_same_length(dst: memoryview, src: memoryview) -> None:
    if len(dst) != len(src):
        raise ValueError(f"the destination has {len(dst)} bytes and the source {len(src)}")


def _check_bits(bitmap: memoryview, bits: int) -> None:
    if not 0 <= bits <= 8 * len(bitmap):
        raise ValueError(f"{bits} bits are not in a bitmap of {len(bitmap)} bytes")


def _checked_page_size(page_size: int) -> int:
    if not 0 < page_size <= sys.maxsize:
        raise ValueError(f"{page_size} bytes is not the size of a page")
    return page_size


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"a seed of {seed} is not an unsigned number of 64 bits")
