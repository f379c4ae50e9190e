"""What each function means is said at its twin in ``_pure.py``."""

from array import array

from vfiostream.buffers import Buffer

def is_zero(data: Buffer) -> bool: ...
def copy(dst: bytearray | memoryview, src: Buffer) -> None: ...
def bitmap_runs(bitmap: Buffer, bits: int) -> array[int]: ...
def bitmap_merge(dst: bytearray | memoryview, src: Buffer) -> None: ...
def bitmap_count(bitmap: Buffer, bits: int) -> int: ...
def gather(
    memory: Buffer,
    runs: array[int] | Buffer,
    index: int,
    skip: int,
    out: bytearray | memoryview,
    page_size: int,
) -> tuple[int, int, int]: ...
def scatter(
    memory: bytearray | memoryview,
    runs: array[int] | Buffer,
    index: int,
    skip: int,
    data: Buffer,
    page_size: int,
) -> tuple[int, int]: ...
