"""A TCP proxy in threads of its own, which cuts connections where a test wants it, whoever is at its ends."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

Cuts = Callable[[int, int, int], bool]
"""Whether to cut, given the number of the connection (from 0), and the bytes that it has carried forth and back."""


class CuttingProxy:
    """Carries each connection to ``port`` of the loopback until ``cuts`` says that it ends, without a word to either
    end.
    """

    def __init__(self, port: int, cuts: Cuts = lambda *_: False) -> None:
        self.target = port
        self._cuts = cuts
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self.carried: list[list[int]] = []
        """Bytes forth and back, of each connection."""
        self.cut: list[int] = []
        """Numbers of the connections that were cut."""
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def forth(self) -> int:
        return sum(forth for forth, _ in self.carried)

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            try:
                there = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                here.close()
                continue
            with self._lock:
                number = len(self.carried)
                self.carried.append([0, 0])
                self._open += [here, there]
            for way, pair in enumerate(((here, there), (there, here))):
                threading.Thread(target=self._carry, args=(number, way, *pair), daemon=True).start()

    def _carry(self, number: int, way: int, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                target.sendall(data)
                self.carried[number][way] += len(data)
                if self._cuts(number, *self.carried[number]):
                    self.cut.append(number)
                    break
            else:
                target.shutdown(socket.SHUT_WR)
                return
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut_all(self) -> None:
        """Cut every connection that there is."""
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self.cut_all()
        for sock in self._open:
            sock.close()
