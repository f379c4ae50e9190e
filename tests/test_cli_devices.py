"""``vfiostream devices`` on hosts of our own making."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fake_kernel import BDF, GROUP, NODE, UUID, FakeKernel
from tests.test_cli_processes import check_fields
from vfiostream.cli import devices as command, main
from vfiostream.closing import Closing
from vfiostream.devices.contract import DeviceDescription
from vfiostream.errors import DeviceRefused


class Described(Closing):
    """What is left of a device for who only asks what it is."""

    description = DeviceDescription("four-region", None, True, True, 4096, 8192, None)

    async def aclose(self) -> None:
        pass


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    made = FakeKernel(tmp_path)
    monkeypatch.setattr(command, "Kernel", lambda: made)
    return made


@pytest.fixture
def host(kernel: FakeKernel) -> FakeKernel:
    """A PCI device whose driver is none of VFIO's, a bridge, a mediated device, and one of neither bus."""
    kernel.add_pci("nvidia", node=False)
    kernel.add_mdev()
    kernel.make_link("/sys/bus/pci/devices/0000:3a:00.0/iommu_group", f"/sys/kernel/iommu_groups/{GROUP}")
    kernel.make_file("/sys/bus/pci/devices/0000:3a:00.0/class", "0x060400\n")
    kernel.make_file("/dev/vfio/devices/vfio1")
    kernel.make_link("/sys/devices/fsl-mc/dprc.2/driver", "/sys/bus/any/drivers/vfio-fsl-mc")
    kernel.make_folder("/sys/devices/fsl-mc/dprc.2/vfio-dev/vfio1")
    kernel.make_link("/sys/class/vfio-dev/vfio1/device", "/sys/devices/fsl-mc/dprc.2")
    return kernel


def test_a_host_with_nothing(kernel: FakeKernel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    assert capsys.readouterr().out.startswith("this host has no device that could move: ")
    assert main(["devices", "--json"]) == 0
    event = json.loads(capsys.readouterr().out)
    check_fields(event, "summary of devices")
    assert event["devices"] == []


def test_what_is_there_and_what_is_in_the_way(host: FakeKernel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--json"]) == 0
    event = json.loads(capsys.readouterr().out)
    check_fields(event, "summary of devices")
    for entry in event["devices"]:
        check_fields(entry, "a device of this host")
    shown = ("address", "kind", "driver", "bound", "group", "node", "probed", "device")
    assert [tuple(entry[name] for name in shown) for entry in event["devices"]] == [
        (f"vfio:{BDF}", "pci", "nvidia", False, GROUP, f"/dev/vfio/{GROUP}", False, None),
        (f"vfio:{UUID}", "mdev", "vfio_mdev", True, GROUP, NODE, False, None),
        ("vfio:/dev/vfio/devices/vfio1", "other", "vfio-fsl-mc", True, None, "/dev/vfio/devices/vfio1", False, None),
    ]
    assert "is bound to the driver nvidia: " in event["devices"][0]["problem"]
    assert [entry["problem"] for entry in event["devices"][1:]] == [None, None]
    assert not host.calls  # nothing was opened


def test_a_table_for_people(host: FakeKernel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["device", "driver", "group", "node", "interface"],
        [f"vfio:{BDF}", "nvidia", GROUP, f"/dev/vfio/{GROUP}", "not", "ready"],
        [f"vfio:{UUID}", "vfio_mdev", GROUP, NODE, "not", "probed"],
        ["vfio:/dev/vfio/devices/vfio1", "vfio-fsl-mc", "none", "/dev/vfio/devices/vfio1", "not", "probed"],
    ]
    assert lines[4].startswith(f"vfio:{BDF} is bound to the driver nvidia: ")
    assert len(lines) == 5


def test_probing_opens_what_can_be_opened(
    host: FakeKernel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def open_device(address: str, *, timeout: float) -> Described:
        asked.append(address)
        if address == f"vfio:{UUID}":
            return Described()
        raise DeviceRefused(address, "opening it", 16)

    monkeypatch.setattr(command, "open_device", open_device)
    assert main(["devices", "--probe", "--json"]) == 0
    event = json.loads(capsys.readouterr().out)
    assert asked == [f"vfio:{UUID}", "vfio:/dev/vfio/devices/vfio1"]
    _, mdev, other = event["devices"]
    check_fields(mdev["device"], "a device")
    assert (mdev["device"]["interface"], mdev["problem"]) == ("four-region", None)
    assert (other["device"], other["probed"]) == (None, True)
    assert "refused opening it with EBUSY" in other["problem"]
    assert main(["devices", "--probe"]) == 0
    out = capsys.readouterr().out
    assert "  interface    four-region" in out
    assert out.splitlines()[-1].startswith("vfio:/dev/vfio/devices/vfio1: the driver refused opening it with EBUSY")
