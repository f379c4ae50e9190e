"""``devices``: what of this host could move, and what is in the way."""

from __future__ import annotations

from dataclasses import dataclass

import anyio.to_thread
import click
from rich.table import Table
from rich.text import Text

from vfiostream.access.kernel_calls import Kernel
from vfiostream.access.kernel_host import HostDevice, address, list_devices, node_of, trouble
from vfiostream.cli import options
from vfiostream.cli.describe import description_document, description_lines
from vfiostream.cli.exits import Exit
from vfiostream.cli.report import Result, table_lines
from vfiostream.cli.run import Output, Run, carry_out
from vfiostream.cli.values import printable
from vfiostream.devices import open_device
from vfiostream.devices.contract import DeviceDescription
from vfiostream.errors import VfiostreamError


@dataclass(slots=True)
class _Row:
    """A device, and what came of it."""

    device: HostDevice
    node: str | None
    problem: str | None
    """Why it can't be opened, or be moved: a clause that goes on from its address, or a sentence."""
    probed: bool = False
    description: DeviceDescription | None = None

    @property
    def state(self) -> str:
        if self.description is not None:
            return self.description.interface
        if self.probed:
            return "can't move"
        return "not probed" if self.problem is None else "not ready"


@click.command
@click.option("--probe", is_flag=True, help="Open each device that can be opened, and ask its driver what it can do.")
@options.device_timeout
@options.answers
def devices(probe: bool, device_timeout: float, output: Output) -> Exit:
    """List the devices of this host that could move, and what is in the way.

    Looks at PCI devices with an IOMMU group, mediated devices and what else the kernel's VFIO has. What a driver can do
    only the driver knows. So --probe opens the devices, which stops nothing, but resets many a device that nobody
    uses when it is opened and closed; one that somebody has open says so and is left alone.
    """

    async def work(run: Run) -> None:
        kernel = Kernel()
        rows = await anyio.to_thread.run_sync(_look, kernel)
        for row in rows:
            if probe and row.problem is None:
                await _probe(row, device_timeout)
        run.result = Result({"status": "done", "devices": [_document(row) for row in rows]}, _lines(rows))

    return carry_out(work, output, cancelled="nothing was changed")


def _look(kernel: Kernel) -> list[_Row]:
    return [_Row(device, node_of(kernel, device), trouble(kernel, device)) for device in list_devices(kernel)]


async def _probe(row: _Row, timeout: float) -> None:
    row.probed = True
    try:
        async with await open_device(address(row.device), timeout=timeout) as device:
            row.description = device.description
    except VfiostreamError as error:
        row.problem = str(error)


def _document(row: _Row) -> dict[str, object]:
    name = address(row.device)
    return {
        "address": name,
        "kind": row.device.kind,
        "driver": row.device.driver,
        "bound": row.device.bound,
        "group": row.device.group,
        "node": row.node,
        "probed": row.probed,
        "device": None if row.description is None else description_document(name, row.description),
        "problem": row.problem,
    }


def _lines(rows: list[_Row]) -> list[str]:
    if not rows:
        return [
            "this host has no device that could move: no PCI device in an IOMMU group, no mediated device, and nothing "
            "else of the kernel's VFIO"
        ]
    table = Table(box=None, pad_edge=False)
    for title in ("device", "driver", "group", "node", "interface"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        cells = (address(row.device), row.device.driver or "none", row.device.group or "none", row.node or "none")
        table.add_row(*(Text(printable(cell)) for cell in (*cells, row.state)))
    lines = table_lines(table)
    for row in rows:
        name = address(row.device)
        if row.description is not None:
            lines += description_lines(name, row.description)
        elif row.problem is not None:
            lines.append(row.problem if name in row.problem else f"{name} {row.problem}")
    return lines
