"""What each function means is said at its twin in ``_pure.py``."""

from array import array

from vfiostream.buffers import Buffer

def is_zero(data: Buffer) -> bool: ...
def nonzero_pages(data: Buffer, page_size: int, bitmap: bytearray | memoryview) -> int: ...
def copy(dst: bytearray | memoryview, src: Buffer) -> None: ...
def copy_check(dst: bytearray | memoryview, src: Buffer, head: Buffer, seed: int) -> int | None: ...
def bitmap_runs(bitmap: Buffer, bits: int, gap: int = 0) -> array[int]: ...
def bitmap_merge(dst: bytearray | memoryview, src: Buffer) -> None: ...
def bitmap_and_not(dst: bytearray | memoryview, src: Buffer) -> None: ...
def bitmap_extract(bitmap: Buffer, first: int, bits: int, out: bytearray | memoryview) -> None: ...
def bitmap_count(bitmap: Buffer, bits: int) -> int: ...
def gather(
    memory: Buffer,
    runs: array[int] | Buffer,
    index: int,
    skip: int,
    out: bytearray | memoryview,
    page_size: int,
) -> tuple[int, int, int]: ...
def gather_check(
    memory: Buffer,
    runs: array[int] | Buffer,
    index: int,
    skip: int,
    out: bytearray | memoryview,
    page_size: int,
    head: Buffer,
    seed: int,
) -> tuple[int, int, int, int | None]: ...
def scatter(
    memory: bytearray | memoryview,
    runs: array[int] | Buffer,
    index: int,
    skip: int,
    data: Buffer,
    page_size: int,
) -> tuple[int, int]: ...
def levels() -> tuple[str, ...]:
    """The kinds of processor the loops were compiled for that this one can run, best last."""

def use_level(level: str) -> None:
    """Run the loops of another level than the best, for tests and measurements. Raises ``ValueError``."""
