"""Over TCP and UNIX sockets, uncompressed: against C, QEMU and iperf3, and the event loops against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import anyio

from benchmarks import qemu
from benchmarks.acceptance import bar0
from benchmarks.contents import write
from benchmarks.moving import Backend, End, move, reference_device
from benchmarks.pairs import Run
from benchmarks.peers import CIPHER, iperf, limit, ngtcp2, openssl, openssl_content, plain_quic
from benchmarks.plan import MIB, CannotRun, Plan
from benchmarks.row import Row, compare, processor_time
from vfiostream.transports.certificates import make_pair

REGIONS = (16 * MIB, 4 * MIB, MIB)
CHANNELS = (4, 16)
BACKENDS: Sequence[Backend] = ("asyncio", "uvloop", "trio")


def device_to_device(plan: Plan) -> Iterator[Row]:
    """In regions of the reference device's own size, of 4 MiB, and of one chunk."""
    for region in REGIONS:
        path = f"TCP, device to device, regions of {region // MIB} MiB"
        device = End("send", memory=plan.size, region=region, settings={"chunk": plan.chunk})
        rounds = plan.rounds(
            {
                "ours": partial(_ours, device),
                "C, device to device": partial(limit, "device", "tcp", plan.size, chunk=plan.chunk, region=region),
            }
        )
        yield compare(rounds, "ours", "C, device to device", path=path, must=0.9)
        yield from processor_time(rounds, "ours", "C, device to device", path=path, must=1.4)


def _ours(source: End, target: End | None = None) -> Run:
    return move(source, target).run


def guest_memory(plan: Plan) -> Iterator[Row]:
    path = "TCP, guest memory only"
    rounds = plan.rounds(
        {
            "ours": lambda: guest_only(plan),
            "C, region to region": lambda: limit("region", "tcp", plan.size, chunk=plan.chunk),
        }
    )
    yield compare(rounds, "ours", "C, region to region", path=path, must=0.9)
    yield from processor_time(rounds, "ours", "C, region to region", path=path, must=1.4)


def guest_only(plan: Plan, backend: Backend = "asyncio", address: str = "tcp:127.0.0.1:0") -> Run:
    return move(End("send", address=address, backend=backend, guest=plan.size, settings={"chunk": plan.chunk})).run


def against_qemu(plan: Plan) -> Iterator[Row]:
    """Both move the same file, from the same pages of memory."""
    with plan.folder() as folder:
        content, target = folder / "content", folder / "target"
        write(content, "random", plan.size)
        write(target, "random", plan.size)  # so that all its pages are there
        source = End("send", guest=plan.size, file=str(content), settings={"chunk": plan.chunk})
        taking = End("receive", guest=plan.size, file=str(target))
        rounds = plan.rounds(
            {
                "ours": lambda: _ours(source, taking),
                "QEMU, two multifd channels": lambda: qemu.migrate(content, target, plan.size, folder),
            }
        )
    yield compare(rounds, "ours", "QEMU, two multifd channels", path="TCP, guest memory only", must=1.0)


def fresh_target(plan: Plan) -> Iterator[Row]:
    source = End("send", guest=plan.size, settings={"chunk": plan.chunk})
    taking = End("receive", guest=plan.size, populated=False)
    rounds = plan.rounds(
        {
            "ours": lambda: _ours(source, taking),
            "C, which does not populate": lambda: limit("region", "tcp", plan.size, chunk=plan.chunk, populated=False),
        }
    )
    yield compare(
        rounds,
        "ours",
        "C, which does not populate",
        path="TCP, guest memory only, a target not touched before",
        must=1.5,
    )


def unix_socket(plan: Plan) -> Iterator[Row]:
    with plan.folder() as folder:
        address = f"unix:{folder / 'link'}"
        region = REGIONS[0]
        device = End("send", address=address, memory=plan.size, region=region, settings={"chunk": plan.chunk})
        rounds = plan.rounds(
            {
                "ours": lambda: _ours(device),
                "C, device to device": lambda: limit("device", "unix", plan.size, chunk=plan.chunk, region=region),
            }
        )
        yield compare(rounds, "ours", "C, device to device", path="UNIX socket, device to device", must=0.9)
        rounds = plan.rounds(
            {
                "ours": lambda: guest_only(plan, address=address),
                "C, region to region": lambda: limit("region", "unix", plan.size, chunk=plan.chunk),
            }
        )
        yield compare(rounds, "ours", "C, region to region", path="UNIX socket, guest memory only", must=0.9)


def tls(plan: Plan) -> Iterator[Row]:
    """Ours has a device at both ends, checks what arrives, and puts it where it belongs; OpenSSL's server throws it
    away.
    """
    path = "TLS over TCP, device to device"
    with plan.folder() as folder:
        content, certificates = folder / "content", folder / "certificates"
        openssl_content(content, plan.size)
        make_pair(certificates, ["127.0.0.1"], days=1)
        device = End(
            "send",
            address="tls:127.0.0.1:0",
            certificates=str(certificates),
            memory=plan.size,
            region=REGIONS[0],
            settings={"chunk": plan.chunk},
        )
        rounds = plan.rounds(
            {
                "ours": partial(_ours, device),
                "OpenSSL, s_client to s_server": partial(openssl, content, certificates, plan.size),
            }
        )
    yield compare(rounds, "ours", "OpenSSL, s_client to s_server", path=path, must=0.9, note=f"{CIPHER} both")
    yield from processor_time(rounds, "ours", "OpenSSL, s_client to s_server", path=path, must=1.0)


def channels(plan: Plan) -> Iterator[Row]:
    """Several connections against one, each side on a core of its own and no other."""
    with plan.folder() as folder:
        for name, address in (("TCP", "tcp:127.0.0.1:0"), ("UNIX socket", f"unix:{folder / 'link'}")):
            for backend in BACKENDS:
                rounds = plan.rounds(
                    {
                        f"{count} channels": partial(_on_a_core_each, plan, address, backend, count)
                        for count in (1, *CHANNELS)
                    }
                )
                for count in CHANNELS:
                    yield compare(
                        rounds,
                        f"{count} channels",
                        "1 channels",
                        path=f"{name}, guest memory only, a core a side, {backend}",
                        must=1.0 if count == 4 else None,
                    )


def _on_a_core_each(plan: Plan, address: str, backend: Backend, channels: int) -> Run:
    source = End("send", address, backend, guest=plan.size, channels=channels, core=0, settings={"chunk": plan.chunk})
    return move(source, replace(source, does="receive", core=1)).run


def quic(plan: Plan) -> Iterator[Row]:
    """Ours has a device at both ends, checks what arrives, and puts it where it belongs; the others throw it away."""
    plain, found, large = "ngtcp2, server to client", "qh3 alone", "qh3 alone, datagrams of 9000 bytes"
    with plan.folder() as folder:
        content, certificates = folder / "content", folder / "certificates"
        write(content, "random", plan.size)
        make_pair(certificates, ["127.0.0.1"], days=1)
        device = End(
            "send",
            address="quic:127.0.0.1:0",
            certificates=str(certificates),
            memory=plan.size,
            region=REGIONS[0],
            settings={"chunk": plan.chunk},
        )
        ours = {backend: partial(_ours, replace(device, backend=backend)) for backend in BACKENDS}
        rounds = plan.rounds(
            {
                **ours,
                found: partial(plain_quic, certificates, plan.size, datagram=0),
                large: partial(plain_quic, certificates, plan.size, datagram=9000),
                plain: partial(ngtcp2, content, certificates, plan.size),
            }
        )
    for backend in BACKENDS:
        path = f"QUIC, device to device, {backend}"
        yield compare(rounds, backend, found, path=path, must=1.0, note="packets of 1500 bytes, as it finds itself")
        yield compare(rounds, backend, large, path=path, must=None, note="as ours are on loopback")
        yield compare(rounds, backend, plain, path=path, must=0.5)


def event_loops(plan: Plan) -> Iterator[Row]:
    contestants: dict[str, Callable[[], Run]] = {backend: partial(guest_only, plan, backend) for backend in BACKENDS}
    rounds = plan.rounds(contestants)
    for ours, theirs in (("uvloop", "asyncio"), ("trio", "asyncio"), ("trio", "uvloop")):
        yield compare(
            rounds, ours, theirs, path=f"TCP, guest memory only, {ours}", must=0.1, sense="within", against=theirs
        )


def own_processes(plan: Plan) -> Iterator[Row]:
    """The devices of the first rows in processes of their own, over vfio-user: four processes on these cores."""
    region = REGIONS[0]
    rounds = plan.rounds(
        {
            "ours": lambda: served(plan),
            "C, device to device": lambda: limit("device", "tcp", plan.size, chunk=plan.chunk, region=region),
        }
    )
    yield compare(
        rounds,
        "ours",
        "C, device to device",
        path="TCP, device to device, each device in a process of its own",
        must=None,
        note="regions of 16 MiB; C has no such processes",
    )


def served(plan: Plan, *options: str) -> Run:
    """Move a device between two processes that serve reference devices; ``options`` are the source's."""
    common = ("--memory", str(plan.size), "--memory-region", str(REGIONS[0]), "--config", "4096")
    with plan.folder() as folder:
        one, other = folder / "source", folder / "target"
        with (
            reference_device(one, *common, "--data", "random", "--seed", "1", *options),
            reference_device(other, *common, "--data", "zeros", "--seed", "2"),
        ):
            settings = {"chunk": plan.chunk}
            moved = move(End("send", socket=str(one), settings=settings), End("receive", socket=str(other)))
            if anyio.run(bar0, one)[0] != anyio.run(bar0, other)[0]:
                raise CannotRun("what arrived is not what was sent: the reference devices differ")
    return moved.run


def iperf3(plan: Plan) -> Iterator[Row]:
    rounds = plan.rounds({"ours": lambda: guest_only(plan), "iperf3, one stream": lambda: iperf(plan.size)})
    yield compare(
        rounds,
        "ours",
        "iperf3, one stream",
        path="TCP, guest memory only",
        must=None,
        note="sends one buffer over and over, which stays in the cache",
    )


MEASUREMENTS = (
    device_to_device,
    guest_memory,
    against_qemu,
    fresh_target,
    unix_socket,
    tls,
    channels,
    quic,
    event_loops,
    own_processes,
    iperf3,
)
