"""qh3 alone: what its sans-IO connection moves with GSO and GRO and nothing around it, from one process to another.

``python -m benchmarks.plain_quic SIZE DATAGRAM CERTIFICATES`` sends SIZE bytes of one buffer, in datagrams of DATAGRAM
bytes (0 for what the library finds the path to carry), to a process that throws them away. The clock runs from the
first byte that is handed over to the last one that arrived. One line of JSON on its output: seconds and CPU seconds of
both sides. The socket is ours, as it has to be somebody's; it waits with ``select``, and there is no event loop.
"""

from __future__ import annotations

import json
import os
import select
import socket
import ssl
import sys
from pathlib import Path
from time import monotonic, process_time

from qh3 import QuicConfiguration, QuicConnection, quic_events

from vfiostream.transports.udp import UdpSocket

CHUNK = 1 << 20
WINDOW = 32 << 20
"""Flow control, never in the way."""
BACKLOG = 2 << 20
"""Bytes that are handed to the library ahead."""
BURST = 64
SAFE = 1232


def configured(datagram: int, *, is_client: bool) -> QuicConfiguration:
    return QuicConfiguration(
        is_client=is_client,
        alpn_protocols=["plain"],
        max_data=WINDOW,
        max_stream_data=WINDOW,
        max_datagram_size=datagram or SAFE,
        probe_datagram_size=not datagram,
    )


class Side:
    """One side: a socket and a connection."""

    def __init__(self, udp: UdpSocket) -> None:
        self.udp = udp
        self.quic: QuicConnection | None = None
        self.configuration: QuicConfiguration | None = None

    def turn(self) -> list[quic_events.QuicEvent]:
        """Wait for something to happen, hand it over and return it."""
        timer = self.quic.get_timer() if self.quic is not None else None
        limit = None if timer is None else max(0.0, timer - monotonic())
        select.select([self.udp.sock], [self.udp.sock] if self.udp.blocked else [], [], limit)
        now = monotonic()
        for _ in range(BURST):
            came = self.udp.receive()
            if came is None:
                break
            data, segment, address, _ = came
            if self.quic is None:
                assert self.configuration is not None
                # Of a first datagram, the id of the connection is there (RFC 8999, 5.1).
                self.quic = QuicConnection(
                    configuration=self.configuration, original_destination_connection_id=data[6 : 6 + data[5]]
                )
            if len(data) > segment:
                self.quic.receive_gro_buffer(data, segment, address, now)
            else:
                self.quic.receive_datagram(data, address, now)
        if self.quic is None:
            return []
        timer = self.quic.get_timer()
        if timer is not None and timer <= now:
            self.quic.handle_timer(now)
        events = []
        while (event := self.quic.next_event()) is not None:
            events.append(event)
        return events

    def flush(self) -> None:
        self.udp.send_on()
        if self.quic is not None and not self.udp.blocked:
            self.udp.send(self.quic.datagrams_to_send(monotonic()))


def bound() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock


def send(port: int, size: int, datagram: int) -> tuple[float, float]:
    """Returns when it began, and the CPU seconds that it took."""
    side = Side(UdpSocket(bound()))
    configuration = configured(datagram, is_client=True)
    configuration.verify_mode = ssl.CERT_NONE
    side.quic = QuicConnection(configuration=configuration)
    side.quic.connect(("127.0.0.1", port), monotonic())
    side.flush()
    chunk = os.urandom(CHUNK)
    began = cpu = 0.0
    sent = 0
    while True:
        for event in side.turn():
            if isinstance(event, quic_events.HandshakeCompleted):
                began, cpu = monotonic(), process_time()
            elif isinstance(event, quic_events.ConnectionTerminated):
                return began, process_time() - cpu
        while began and sent < size and side.quic.get_send_buffer_size(0) < BACKLOG:
            sent += CHUNK
            side.quic.send_stream_data(0, chunk, sent >= size)
        side.flush()


def receive(side: Side, size: int) -> tuple[float, float]:
    """Returns when the last byte was there, and the CPU seconds that it took."""
    received, cpu = 0, 0.0
    while received < size:
        for event in side.turn():
            if isinstance(event, quic_events.StreamDataReceived):
                cpu = cpu or process_time()
                received += len(event.data)
            elif isinstance(event, quic_events.ConnectionTerminated):
                raise SystemExit(f"the connection ended: {event.reason_phrase}")
        side.flush()
    ended, cpu = monotonic(), process_time() - cpu
    assert side.quic is not None
    side.quic.close()
    side.flush()
    return ended, cpu


def main() -> None:
    size, datagram, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    side = Side(UdpSocket(bound()))
    port = side.udp.sock.getsockname()[1]
    out, into = os.pipe()
    if os.fork() == 0:
        os.write(into, json.dumps(send(port, size, datagram)).encode())
        os._exit(0)
    side.configuration = configured(SAFE, is_client=False)
    side.configuration.load_cert_chain(folder / "target.pem", folder / "target.key")
    ended, receiving = receive(side, size)
    began, sending = json.loads(os.read(out, 1000))
    os.wait()
    print(json.dumps({"seconds": ended - began, "sender_cpu": sending, "receiver_cpu": receiving}))


if __name__ == "__main__":
    main()
