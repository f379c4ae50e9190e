"""What a payload stands for: the content itself, zeros, or a zstd frame. The only module that knows zstd."""

from __future__ import annotations

import zstandard

from vfiostream import _accel
from vfiostream.buffers import Buffer
from vfiostream.errors import StreamError
from vfiostream.protocol import limits
from vfiostream.protocol.framing import FLAG_ZERO, FLAG_ZSTD

MAX_LEVEL = 19


def bound(size: int) -> int:
    """Most bytes that ``size`` bytes of content can take while they are being compressed: the content, and the output
    of a compressor that finds nothing to save (``ZSTD_COMPRESSBOUND``).
    """
    return size + size // 256 + 1024


class Compressor:
    """Turns content into payload. One for each thread: the zstd context is not shared."""

    def __init__(self, level: int = 1) -> None:
        """``level`` is zstd's, 1 to 19."""
        self._context = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)

    def compress(self, content: Buffer, level: int = 1) -> bytes | None:
        """Return a zstd frame that is smaller than ``content``, or None where there is none."""
        packed = self._context.compress(content)
        return packed if len(packed) < len(content) else None


class Decompressor:
    """Turns payload into content, never more of it than the frame announced. One for each thread."""

    def __init__(self) -> None:
        self._context = zstandard.ZstdDecompressor()

    def content(self, payload: Buffer, flags: int, content_size: int, where: str) -> Buffer:
        """Return the content of a frame: ``payload`` itself where nothing was done to it, else new bytes. Raises
        :class:`~vfiostream.errors.StreamError` before it allocates more than ``content_size`` bytes.
        """
        if flags == FLAG_ZERO:
            return bytes(content_size)
        if flags != FLAG_ZSTD:
            return payload
        try:
            # The library allocates what the zstd frame says of itself, so that is what has to be checked. Its own
            # max_window_size counts only where it decompresses in steps.
            parameters = zstandard.get_frame_parameters(payload)
            if parameters.window_size > limits.MAX_WINDOW:
                raise StreamError(
                    where, f"has a zstd window of {parameters.window_size} bytes (the limit is {limits.MAX_WINDOW})"
                )
            if parameters.content_size != content_size:
                raise StreamError(where, f"has a zstd frame that does not hold just the {content_size} bytes announced")
            content: bytes = self._context.decompress(payload, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise StreamError(where, f"has a payload that zstd can't decompress: {error}") from error
        if len(content) != content_size:
            raise StreamError(where, f"decompresses to {len(content)} bytes, {content_size} were announced")
        return content


def is_zero(content: Buffer) -> bool:
    """Whether ``content`` can be sent as the flag ZERO."""
    return len(content) > 0 and _accel.is_zero(content)
