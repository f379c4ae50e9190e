"""The reference device as a program: a vfio-user server on a UNIX socket.

One client at a time, one after another. The device lives on between them, with its state and memory; the DMA mappings
of a client go with it. Nothing a client sends is believed before it is checked: a message that makes no sense in itself
is answered with an errno, and one after which the next can't be found ends the connection.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from vfiostream.errors import UsageError
from vfiostream.uapi import vfio, vfio_user
from vfiostream.uapi.four_region import PAGE_SIZE
from vfiostream.uapi.vfio_user import Command
from vfiostream.vendor.device import NUM_IRQS, ReferenceDevice
from vfiostream.vendor.faults import Exit, Hang
from vfiostream.vendor.guest import MAX_MAPPINGS
from vfiostream.vendor.settings import Settings

logger = logging.getLogger("vfiostream.vendor")

MAX_TRANSFER = 1024 * 1024
"""Bytes of a region, of migration data or of a feature that one message moves at most; the client is told."""
BACKLOG = 16
"""Clients that may wait for their turn; a non-blocking connect of one more fails."""
EXIT_STATUS = 3
"""With which a fault of the kind ``exit`` ends the process."""

_CAPABILITIES = {
    "max_msg_fds": 1,
    "max_data_xfer_size": MAX_TRANSFER,
    "max_dma_maps": MAX_MAPPINGS,
    "pgsizes": PAGE_SIZE,
}
_IRQ_INFO = struct.Struct("=IIII")
"""argsz, flags, index, count."""
_SET_IRQS = struct.Struct("=IIIII")
"""argsz, flags, index, start, count; data and eventfds follow."""
_IRQ_DATA_NONE = 1 << 0


class _Disconnect(Exception):
    """This client can't be served any further; says why."""


class _Client:
    """One connection, from VERSION on."""

    def __init__(self, device: ReferenceDevice, connection: socket.socket) -> None:
        self._device = device
        self._connection = connection
        self._greeted = False

    def serve(self) -> None:
        """Answer messages until the client goes away. Raises _Disconnect, Hang, Exit, and OSError of the socket."""
        while True:
            received = self._receive()
            if received is None:
                return
            header, body, fds = received
            try:
                self._answer(header, body, fds)
            finally:
                for fd in fds:
                    os.close(fd)

    def _receive(self) -> tuple[vfio_user.Header, memoryview, list[int]] | None:
        """The next message, or None at the end of the connection. The caller closes the fds."""
        fds: list[int] = []
        try:
            raw = self._receive_header(fds)
            if not raw:
                return None
            header = vfio_user.parse_header(raw)
            body = memoryview(bytearray(header.body_size))
            done = 0
            while done < len(body):
                count = self._connection.recv_into(body[done:])
                if count == 0:
                    raise _Disconnect("it went away in the middle of a message")
                done += count
        except vfio_user.BadMessage as error:
            self._close_all(fds)
            raise _Disconnect(str(error)) from error
        except BaseException:
            self._close_all(fds)
            raise
        return header, body, fds

    def _receive_header(self, fds: list[int]) -> bytes:
        """16 bytes, or none at the end of the connection; file descriptors ride on them."""
        raw = b""
        while len(raw) < vfio_user.HEADER.size:
            part, new, flags, _ = socket.recv_fds(
                self._connection, vfio_user.HEADER.size - len(raw), vfio_user.MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
            fds += new
            if flags & socket.MSG_CTRUNC or len(fds) > vfio_user.MAX_FDS:
                raise _Disconnect(f"it sent more than {vfio_user.MAX_FDS} file descriptors")
            if not part:
                if raw:
                    raise _Disconnect("it went away in the middle of a header")
                return b""
            raw += part
        return raw

    @staticmethod
    def _close_all(fds: list[int]) -> None:
        while fds:
            os.close(fds.pop())

    def _answer(self, header: vfio_user.Header, body: memoryview, fds: list[int]) -> None:
        if header.is_reply:
            raise _Disconnect("it sent a reply, and nothing was asked")
        try:
            reply, fd = self._perform(header.command, body, fds)
        except OSError as error:
            logger.info("command %d is refused: %s", header.command, error)
            if header.wants_reply:
                flags = vfio_user.FLAG_REPLY | vfio_user.FLAG_ERROR
                number = error.errno or errno.EIO
                self._send(vfio_user.pack_message(header.msg_id, header.command, flags=flags, errno=number))
            if not self._greeted:
                raise _Disconnect("it did not get past VERSION") from error
            return
        if header.wants_reply:
            message = vfio_user.pack_message(header.msg_id, header.command, reply, flags=vfio_user.FLAG_REPLY)
            self._send(message, fd)

    def _send(self, message: bytes, fd: int | None = None) -> None:
        sent = 0
        if fd is not None:
            sent = socket.send_fds(self._connection, [message], [fd])
        self._connection.sendall(memoryview(message)[sent:])

    def _perform(self, command: int, body: memoryview, fds: list[int]) -> tuple[bytes, int | None]:
        """Do what a command asks; returns the body of the reply and the fd to send with it. Raises OSError."""
        if not self._greeted:
            if command != Command.VERSION:
                raise OSError(errno.EINVAL, "the first message is not VERSION")
            return self._greet(bytes(body)), None
        if fds and command not in (Command.DMA_MAP, Command.SET_IRQS):
            raise OSError(errno.EINVAL, f"command {command} carries file descriptors")
        match command:
            case Command.VERSION:
                raise OSError(errno.EINVAL, "VERSION comes once")
            case Command.DMA_MAP:
                return self._dma_map(body, fds), None
            case Command.DMA_UNMAP:
                return self._dma_unmap(body), None
            case Command.DEVICE_GET_INFO:
                return self._device_info(body), None
            case Command.GET_REGION_INFO:
                return self._region_info(body)
            case Command.GET_IRQ_INFO:
                return self._irq_info(body), None
            case Command.SET_IRQS:
                return self._set_irqs(body, fds), None
            case Command.REGION_READ:
                return self._region_read(body), None
            case Command.REGION_WRITE:
                return self._region_write(body), None
            case Command.DEVICE_RESET:
                _require_size(body, 0)
                self._device.reset()
                return b"", None
            case Command.DEVICE_FEATURE:
                return self._feature(body), None
            case Command.MIG_DATA_READ:
                return self._data_read(body), None
            case Command.MIG_DATA_WRITE:
                return self._data_write(body), None
        raise OSError(errno.EOPNOTSUPP, f"command {command} is not supported")

    def _greet(self, body: bytes) -> bytes:
        try:
            major, minor, _ = vfio_user.parse_version(body)
        except vfio_user.BadMessage as error:
            raise OSError(errno.EINVAL, str(error)) from error
        if major != vfio_user.MAJOR:
            raise OSError(errno.EINVAL, f"it speaks version {major} of vfio-user, this server {vfio_user.MAJOR}")
        self._greeted = True
        return vfio_user.pack_version(vfio_user.MAJOR, min(minor, vfio_user.MINOR), _CAPABILITIES)

    def _dma_map(self, body: memoryview, fds: list[int]) -> bytes:
        _require_size(body, vfio_user.DMA_MAP.size)
        argsz, flags, offset, address, size = vfio_user.DMA_MAP.unpack(body)
        known = vfio_user.DMA_FLAG_READ | vfio_user.DMA_FLAG_WRITE
        if argsz < vfio_user.DMA_MAP.size or not flags & known or flags & ~known:
            raise OSError(errno.EINVAL, f"DMA_MAP with argsz {argsz} and flags {flags:#x} makes no sense")
        if len(fds) != 1:
            raise OSError(errno.EINVAL, f"DMA_MAP needs one file descriptor to map, {len(fds)} came with it")
        self._device.dma_map(address, size, fds[0], offset, writable=bool(flags & vfio_user.DMA_FLAG_WRITE))
        return b""

    def _dma_unmap(self, body: memoryview) -> bytes:
        _require_size(body, vfio_user.DMA_UNMAP.size)
        argsz, flags, address, size = vfio_user.DMA_UNMAP.unpack(body)
        if argsz < vfio_user.DMA_UNMAP.size or flags:
            raise OSError(errno.EINVAL, f"DMA_UNMAP with argsz {argsz} and flags {flags:#x} is not supported")
        self._device.dma_unmap(address, size)
        return bytes(body)

    def _device_info(self, body: memoryview) -> bytes:
        _require_size(body, vfio.DEVICE_INFO.size)
        if vfio.DEVICE_INFO.unpack(body)[0] < vfio.DEVICE_INFO.size:
            raise OSError(errno.EINVAL, "DEVICE_GET_INFO has too small an argsz")
        flags = vfio.DEVICE_FLAGS_RESET | vfio.DEVICE_FLAGS_PCI
        return vfio.DEVICE_INFO.pack(vfio.DEVICE_INFO.size, flags, len(self._device.regions), NUM_IRQS)

    def _region_info(self, body: memoryview) -> tuple[bytes, int | None]:
        size = vfio.REGION_INFO.size
        _require_size(body, size)
        argsz, _, index, _, _, _ = vfio.REGION_INFO.unpack(body)
        if argsz < size or index >= len(self._device.regions):
            raise OSError(errno.EINVAL, f"GET_REGION_INFO with argsz {argsz} for region {index} makes no sense")
        region = self._device.regions[index]
        flags = (
            region.readable * vfio.REGION_FLAG_READ
            | region.writable * vfio.REGION_FLAG_WRITE
            | bool(region.mappable) * vfio.REGION_FLAG_MMAP
        )
        caps = vfio.pack_capabilities(size, type_=region.type, sparse=region.mappable if region.sparse else None)
        if caps:
            flags |= vfio.REGION_FLAG_CAPS
        full = size + len(caps)
        if argsz < full:  # the client asks again, with room for the capabilities
            return vfio.REGION_INFO.pack(full, flags, index, 0, region.size, 0), None
        fd = region.fd if region.mappable else None
        return vfio.REGION_INFO.pack(full, flags, index, size if caps else 0, region.size, 0) + caps, fd

    def _irq_info(self, body: memoryview) -> bytes:
        _require_size(body, _IRQ_INFO.size)
        argsz, _, index, _ = _IRQ_INFO.unpack(body)
        if argsz < _IRQ_INFO.size or index >= NUM_IRQS:
            raise OSError(errno.EINVAL, f"GET_IRQ_INFO with argsz {argsz} for {index} makes no sense")
        return _IRQ_INFO.pack(_IRQ_INFO.size, 0, index, 0)

    def _set_irqs(self, body: memoryview, fds: list[int]) -> bytes:
        """This device has no interrupts, so all a client can do is turn none of them off."""
        if len(body) < _SET_IRQS.size:
            raise OSError(errno.EINVAL, f"SET_IRQS of {len(body)} bytes is too short")
        argsz, flags, index, start, count = _SET_IRQS.unpack_from(body)
        if argsz < _SET_IRQS.size or index >= NUM_IRQS or start or count or fds or not flags & _IRQ_DATA_NONE:
            raise OSError(errno.EINVAL, f"SET_IRQS asks for interrupts of {index}, this device has none")
        return b""

    def _region_read(self, body: memoryview) -> bytes:
        _require_size(body, vfio_user.REGION_ACCESS.size)
        offset, index, count = vfio_user.REGION_ACCESS.unpack(body)
        if count > MAX_TRANSFER:
            raise OSError(errno.EINVAL, f"a read of {count} bytes is larger than the {MAX_TRANSFER} agreed on")
        reply = bytearray(body) + bytes(count)
        self._device.read(index, offset, memoryview(reply)[vfio_user.REGION_ACCESS.size :])
        return bytes(reply)

    def _region_write(self, body: memoryview) -> bytes:
        if len(body) < vfio_user.REGION_ACCESS.size:
            raise OSError(errno.EINVAL, f"REGION_WRITE of {len(body)} bytes is too short")
        offset, index, count = vfio_user.REGION_ACCESS.unpack_from(body)
        data = body[vfio_user.REGION_ACCESS.size :]
        if count != len(data) or count > MAX_TRANSFER:
            raise OSError(errno.EINVAL, f"REGION_WRITE says {count} bytes and has {len(data)}, {MAX_TRANSFER} at most")
        self._device.write(index, offset, data)
        return bytes(body[: vfio_user.REGION_ACCESS.size])

    def _feature(self, body: memoryview) -> bytes:
        size = vfio.FEATURE.size
        if len(body) < size:
            raise OSError(errno.EINVAL, f"DEVICE_FEATURE of {len(body)} bytes is too short")
        argsz, flags = vfio.FEATURE.unpack_from(body)
        if flags == vfio.FeatureOperation.GET | vfio.Feature.DMA_LOGGING_REPORT:
            self._check_report(argsz, body[size:])
        answer = self._device.driver.feature(flags, body[size:])
        if argsz < size + len(answer) and flags & vfio.FeatureOperation.GET:
            raise OSError(errno.EINVAL, f"the answer needs {size + len(answer)} bytes, argsz is {argsz}")
        return vfio.FEATURE.pack(size + len(answer), flags) + answer

    @staticmethod
    def _check_report(argsz: int, data: memoryview) -> None:
        """Refuse a report that there is no room for, before it clears what it would have told."""
        if len(data) == vfio.FEATURE_DMA_LOGGING_REPORT.size and argsz <= MAX_TRANSFER + vfio_user.HEADER.size:
            _, length, page_size = vfio.FEATURE_DMA_LOGGING_REPORT.unpack(data)
            if page_size and vfio.FEATURE.size + len(data) + -(-length // page_size // 64) * 8 <= argsz:
                return
        raise OSError(errno.EINVAL, f"DMA_LOGGING_REPORT with {len(data)} bytes and argsz {argsz}")

    def _data_read(self, body: memoryview) -> bytes:
        size = vfio_user.MIG_DATA.size
        _require_size(body, size)
        argsz, count = vfio_user.MIG_DATA.unpack(body)
        if not 0 < count <= MAX_TRANSFER or argsz < size + count:
            raise OSError(errno.EINVAL, f"a read of {count} bytes with argsz {argsz}, {MAX_TRANSFER} were agreed on")
        reply = bytearray(size + count)
        read = self._device.driver.read_data(memoryview(reply)[size:])
        vfio_user.MIG_DATA.pack_into(reply, 0, size + read, read)
        return bytes(memoryview(reply)[: size + read])

    def _data_write(self, body: memoryview) -> bytes:
        size = vfio_user.MIG_DATA.size
        if len(body) < size:
            raise OSError(errno.EINVAL, f"MIG_DATA_WRITE of {len(body)} bytes is too short")
        _, count = vfio_user.MIG_DATA.unpack_from(body)
        if count != len(body) - size or count > MAX_TRANSFER:
            raise OSError(errno.EINVAL, f"MIG_DATA_WRITE says {count} bytes and has {len(body) - size}")
        self._device.driver.write_data(body[size:])
        return b""


def _require_size(body: memoryview, size: int) -> None:
    if len(body) != size:
        raise OSError(errno.EINVAL, f"the body has {len(body)} bytes, not {size}")


class Server:
    """A device behind a listening socket; the socket is made here, and its file removed by :meth:`close`.

    Raises UsageError when there is no way to listen at ``path``.
    """

    def __init__(self, device: ReferenceDevice, path: str) -> None:
        self._device = device
        self._path = path
        self._connection: socket.socket | None = None
        self._closing = threading.Event()
        self._listener = _listen(path)
        self._inode = os.stat(path).st_ino

    def serve_forever(self) -> None:
        """Serve clients one after another, until :meth:`close` is called from another thread."""
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closing.is_set():
                    return
                raise
            with connection:
                self._connection = connection
                if not self._closing.is_set():
                    self._serve(connection)
                self._connection = None

    def _serve(self, connection: socket.socket) -> None:
        logger.info("%s: a client came", self._path)
        try:
            _Client(self._device, connection).serve()
        except Hang as hang:
            logger.warning("%s: fault: no answer to %s", self._path, hang)
            self._wait_until_gone(connection)
        except Exit as fault:
            logger.warning("%s: fault: the device dies at %s", self._path, fault)
            os._exit(EXIT_STATUS)
        except (_Disconnect, OSError) as error:
            logger.warning("%s: the client is dropped: %s", self._path, error)
        finally:
            self._device.client_gone()
        logger.info("%s: the client is gone", self._path)

    @staticmethod
    def _wait_until_gone(connection: socket.socket) -> None:
        # File descriptors that come along are closed by the kernel, as nobody takes them.
        with contextlib.suppress(ConnectionError):
            while connection.recv(vfio_user.MAX_BODY):
                pass

    def close(self) -> None:
        """Stop serving and remove the socket; the device is not closed. May be called again, and from any thread."""
        if self._closing.is_set():
            return
        self._closing.set()
        with contextlib.suppress(OSError):  # gone already, or never connected
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if (connection := self._connection) is not None:
            with contextlib.suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(FileNotFoundError):  # somebody tidied up before us
            if os.stat(self._path).st_ino == self._inode:
                Path(self._path).unlink()


def _listen(path: str) -> socket.socket:
    """A socket that listens at ``path``, in place of one that nobody listens at. Raises UsageError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        os.chmod(path, 0o600)  # whoever connects has the device
        listener.listen(BACKLOG)
    except UsageError:
        listener.close()
        raise
    except OSError as error:
        listener.close()
        raise UsageError(f"{path}: no socket can be made there ({error}); choose another path") from error
    return listener


def _remove_stale(path: str) -> None:
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path}: there is something that is not a socket; choose another path or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a server whose queue is full answers EAGAIN, and is as alive as any
        with contextlib.suppress(BlockingIOError):
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                Path(path).unlink()
                return
    raise UsageError(f"{path}: a server is listening there; choose another path or stop it")


def serve(settings: Settings, socket_path: str, ready: Callable[[], None] | None = None) -> None:
    """Serve one reference device at ``socket_path`` until SIGINT or SIGTERM; then remove the socket and return.

    ``ready`` is called when clients can connect. For the main thread of a program that has no other threads yet: both
    signals are blocked while it runs. Raises UsageError when there is no way to listen.
    """
    signals = {signal.SIGINT, signal.SIGTERM}
    # Waited for by a thread, not handled: a handler that runs just before a blocking call can't end that call. The
    # threads that start from here on inherit the mask. A blocked signal comes even where a shell had it ignored.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        device = ReferenceDevice(settings)
        with contextlib.closing(device), contextlib.closing(Server(device, socket_path)) as server:

            def wait_for_signal() -> None:
                signal.sigwait(signals)
                logger.info("%s: stopped by a signal", socket_path)
                device.interrupt()
                server.close()

            waiter = threading.Thread(target=wait_for_signal, daemon=True)
            waiter.start()
            if ready is not None:
                ready()
            server.serve_forever()
            waiter.join()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
