"""A program that passes its standard input on to a UNIX socket, and what comes from there to its standard output, as
``nc -U`` does: ``python relay.py PATH``. An end is passed on, and what goes wrong ends it with status 3.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable


def carry(read: Callable[[int], bytes], write: Callable[[bytes], object], end: Callable[[], object]) -> None:
    try:
        while piece := read(1 << 16):
            write(piece)
        end()
    except OSError:
        os._exit(3)


def main(path: str) -> None:
    def put(piece: bytes) -> None:
        while piece:
            piece = piece[os.write(1, piece) :]

    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        there = (lambda count: os.read(0, count), sock.sendall, lambda: sock.shutdown(socket.SHUT_WR))
        thread = threading.Thread(target=carry, args=there, daemon=True)
        thread.start()
        carry(sock.recv, put, lambda: os.close(1))
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1])
