"""A checkpoint from one boot of the kernel to the next: ``scripts/test-kernel`` boots it a second time for this."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.kernel.conftest import MakeMdev
from tests.kernel.test_migrate import GUEST, IOVA, MTTY_SCRATCH, SCRIPT, digest, fill, opened, run

RESULTS = Path("/run/results")
"""On the host."""


if os.environ.get("VFIOSTREAM_KERNEL_BOOT") != "2":

    def test_a_checkpoint_is_made_for_the_next_boot(mdev: MakeMdev) -> None:
        board, serial = (f"vfio:{mdev(kind).uuid}" for kind in ("four-region-16M", "mtty-2"))
        fill(board, 4711)
        run(_mark(serial, b"\x77"))
        (RESULTS / "guest").write_bytes(os.urandom(GUEST))
        _vfiostream("save", board, f"file:{RESULTS}/board", "--force", f"--guest-memory={IOVA:#x}={RESULTS}/guest")
        _vfiostream("save", serial, f"file:{RESULTS}/serial", "--force")
        (RESULTS / "digest").write_text(digest(board))

else:

    def test_it_is_loaded(mdev: MakeMdev, tmp_path: Path) -> None:
        board, serial = (f"vfio:{mdev(kind).uuid}" for kind in ("four-region-16M", "mtty-2"))
        (tmp_path / "guest").write_bytes(bytes(GUEST))
        for name in ("board", "serial"):
            _vfiostream("verify", f"file:{RESULTS}/{name}")
        _vfiostream("restore", f"file:{RESULTS}/board", board, f"--guest-memory={IOVA:#x}={tmp_path}/guest")
        _vfiostream("restore", f"file:{RESULTS}/serial", serial)
        assert digest(board) == (RESULTS / "digest").read_text()
        assert (tmp_path / "guest").read_bytes() == (RESULTS / "guest").read_bytes()
        assert run(_marked(serial)) == b"\x77"


def _vfiostream(*words: str) -> None:
    subprocess.run([SCRIPT, *words], check=True, timeout=60)


async def _mark(address: str, mark: bytes) -> None:
    async with opened(address) as board:
        await board.access.write(0, MTTY_SCRATCH, mark)


async def _marked(address: str) -> bytes:
    async with opened(address) as board:
        return await board.read(0, MTTY_SCRATCH, 1)
