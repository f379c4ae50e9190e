"""Whatever bytes come in, a reader raises StreamError or accepts them: nothing else, ever.

test_protocol_fuzz.py runs this with hypothesis; where atheris is installed, ``python -m tests.fuzz_stream`` runs it
guided by coverage, for as long as you like.
"""

from __future__ import annotations

import struct
import sys
from importlib import import_module

import xxhash

from tests.protocol_streams import CHUNK, HELLO, REPLIES, SESSION, read_stream, stored_frames, take
from vfiostream.errors import StreamError
from vfiostream.protocol import limits
from vfiostream.protocol.framing import PREFIX_SIZE, session_seed
from vfiostream.protocol.sessions import SourceSession, TargetSession

FRAMES = stored_frames()


def fuzz_bytes(data: bytes) -> bool:
    """Read any bytes as a checkpoint; return whether they were one."""
    try:
        read_stream(data)
    except StreamError:
        return False
    return True


def resealed(frame: bytes, sequence: int) -> bytes:
    """The frame with sizes, sequence number and checks made right, so that what lies behind them is reached."""
    header_size = min(struct.unpack_from("<I", frame, 12)[0], len(frame) - PREFIX_SIZE)
    payload_size = len(frame) - PREFIX_SIZE - header_size
    flags = frame[7] % 3
    sealed = bytearray(frame)
    sealed[:6] = b"VFS\xf1\x02\x00"
    sealed[7] = flags
    struct.pack_into("<IQI", sealed, 12, header_size, sequence, payload_size)
    if flags == 0:
        struct.pack_into("<I", sealed, 28, payload_size)
    seed = session_seed(SESSION) if sequence > 1 else 0
    struct.pack_into("<Q", sealed, 32, xxhash.xxh3_64_intdigest(bytes(sealed[PREFIX_SIZE:]), seed))
    struct.pack_into("<Q", sealed, 40, xxhash.xxh3_64_intdigest(bytes(sealed[:40]), seed))
    return bytes(sealed)


def fuzz_frame(number: int, frame: bytes) -> bool:
    """Put a frame, made plausible, in the place of one of the golden stream; return whether all of it was accepted."""
    stream = [*FRAMES[:number], resealed(frame, number + 1), *FRAMES[number + 1 :]]
    return fuzz_bytes(b"".join(stream))


def fuzz_answer(frame: bytes) -> bool:
    """Answer a HELLO with a frame, made plausible; return whether it was accepted."""
    session = SourceSession(HELLO, answers=True)
    session.send(HELLO)
    try:
        take(session, resealed(frame, 1))
    except StreamError:
        return False
    return True


def golden_answer() -> bytes:
    """What :func:`fuzz_answer` accepts."""
    target = TargetSession(chunk=max(CHUNK, limits.MIN_CHUNK), answers=True)
    take(target, FRAMES[0])
    return b"".join(target.send(REPLIES[0][0]))


def one_input(data: bytes) -> None:
    """The first byte says what to do with the others."""
    if not data:
        return
    which, rest = data[0], data[1:]
    if which < len(FRAMES) and len(rest) >= PREFIX_SIZE:
        fuzz_frame(which, rest)
    elif which == len(FRAMES) and len(rest) >= PREFIX_SIZE:
        fuzz_answer(rest)
    else:
        fuzz_bytes(rest)


if __name__ == "__main__":
    atheris = import_module("atheris")
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
