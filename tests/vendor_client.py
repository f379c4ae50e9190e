"""A vfio-user client for tests of the server: it sends what it is told to, sensible or not."""

from __future__ import annotations

import os
import socket

from vfiostream.uapi import vfio, vfio_user
from vfiostream.uapi.vfio_user import Command

TIMEOUT = 10.0
"""Seconds after which a test that waits for a server fails."""


class Client:
    """A vfio-user client that sends what it is told to."""

    def __init__(self, path: str, *, greet: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.next_id = 1
        try:
            self.socket.settimeout(TIMEOUT)
            self.socket.connect(path)
            if greet:
                self.ask(Command.VERSION, vfio_user.pack_version(0, 1, {}))
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, message: bytes, fds: tuple[int, ...] = ()) -> None:
        if fds:
            assert socket.send_fds(self.socket, [message], list(fds)) == len(message)
        else:
            self.socket.sendall(message)

    def receive(self) -> tuple[vfio_user.Header, bytes, list[int]]:
        raw, fds, _, _ = socket.recv_fds(self.socket, vfio_user.HEADER.size, 8, socket.MSG_WAITALL)
        if not raw:
            raise EOFError
        header = vfio_user.parse_header(raw)
        body = b""
        while len(body) < header.body_size:
            part = self.socket.recv(header.body_size - len(body))
            assert part
            body += part
        return header, body, fds

    def ask_with_fds(self, command: int, body: bytes = b"", fds: tuple[int, ...] = ()) -> tuple[bytes, list[int]]:
        """Send a command and take its reply; raises OSError with the errno of an error reply."""
        msg_id, self.next_id = self.next_id, self.next_id + 1
        self.send(vfio_user.pack_message(msg_id, command, body), fds)
        header, reply, received = self.receive()
        assert (header.msg_id, header.command, header.is_reply) == (msg_id, command, True)
        if header.is_error:
            assert reply == b""
            raise OSError(header.errno, os.strerror(header.errno))
        assert header.errno == 0
        return reply, received

    def ask(self, command: int, body: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        reply, received = self.ask_with_fds(command, body, fds)
        assert not received
        return reply

    def is_dropped(self) -> bool:
        """Whether the server has closed the connection."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def read(self, index: int, offset: int, count: int) -> bytes:
        request = vfio_user.REGION_ACCESS.pack(offset, index, count)
        reply = self.ask(Command.REGION_READ, request)
        assert reply[: len(request)] == request
        assert len(reply) == len(request) + count
        return reply[len(request) :]

    def write(self, index: int, offset: int, data: bytes) -> None:
        request = vfio_user.REGION_ACCESS.pack(offset, index, len(data))
        assert self.ask(Command.REGION_WRITE, request + data) == request

    def region_info(self, index: int, argsz: int = 1024) -> tuple[tuple[int, ...], bytes, list[int]]:
        request = vfio.REGION_INFO.pack(argsz, 0, index, 0, 0, 0)
        reply, fds = self.ask_with_fds(Command.GET_REGION_INFO, request)
        return vfio.REGION_INFO.unpack_from(reply), reply, fds

    def dma_map(self, iova: int, size: int, fd: int, *, flags: int = 3) -> None:
        self.ask(Command.DMA_MAP, vfio_user.DMA_MAP.pack(32, flags, 0, iova, size), (fd,))
