"""What it ran on: the machine, and the versions of everything that was compared."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.moving import ROOT
from vfiostream import _accel

PACKAGES = ("anyio", "uvloop", "trio", "msgpack", "xxhash", "zstandard", "Cython")
PROGRAMS = {
    "cc": "--version",
    "iperf3": "--version",
    "zstd": "--version",
    "socat": "-V",
    "qemu-system-x86_64": "--version",
    "cp": "--version",
}
UNKNOWN = "not told"


def describe() -> dict[str, str]:
    """Names and values, in the order in which they are shown."""
    return {
        "cpu": _processor(),
        "virtual machine": "yes" if "hypervisor" in _cpuinfo("flags").split() else "no",
        "cores": str(len(os.sched_getaffinity(0))),
        "governor": _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "huge pages": _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
        + ", shared memory "
        + _chosen(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "accelerator": accelerator(),
        **{name: _package(name) for name in PACKAGES},
        **{name: _program(name, option) for name, option in PROGRAMS.items()},
    }


def accelerator() -> str:
    """Which twin, and for which kind of processor its loops are."""
    if _accel.IMPLEMENTATION != "native":
        return _accel.IMPLEMENTATION
    from vfiostream._accel import _native  # there in this case only

    return f"native, {_native.levels()[-1]}"


def commit() -> str:
    """Of this tree; with a plus where it has changes that are not committed."""
    try:
        name = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
        changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "src", "benchmarks"])
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return name + ("+" if changed else "")


def _output(words: list[str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def _cpuinfo(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _processor() -> str:
    return _cpuinfo("model name") or platform.machine()


def _first_line(path: Path) -> str:
    try:
        return path.read_text().splitlines()[0]
    except (OSError, IndexError):
        return UNKNOWN


def _chosen(path: Path) -> str:
    """What is in brackets, of a file that lists all choices."""
    found = re.search(r"\[(.*?)\]", _first_line(path))
    return found[1] if found else UNKNOWN


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not here"


def _program(name: str, option: str) -> str:
    """The version a program names first."""
    if shutil.which(name) is None:
        return "not here"
    said = subprocess.run([name, option], capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+(\.\d+)*", said.stdout + said.stderr)
    return found[0] if found else UNKNOWN
