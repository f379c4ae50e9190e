"""How devices are reached: the contract, and one module for each way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vfiostream.access.contract import Access
from vfiostream.errors import UsageError

if TYPE_CHECKING:
    from vfiostream.access.record import Recording


SCHEMES = ("vfio-user", "vfio", "replay")
"""What addresses of devices begin with."""


def is_address(text: str) -> bool:
    """Whether ``text`` is meant to be the address of a device."""
    return text.partition(":")[0] in SCHEMES and ":" in text


async def open_access(address: str, *, timeout: float = 60.0, recording: Recording | None = None) -> Access:
    """Open the device at ``address``: ``vfio-user:SOCKET``, with the path of the socket its process listens on;
    ``vfio:`` and one of the kernel's, as :mod:`vfiostream.access.kernel_open` has them; or ``replay:FILE``, with a
    record of one.

    ``timeout`` is how many seconds the device may take for one operation. With ``recording``, what it is asked and
    what it answers is written to a new file (:mod:`vfiostream.access.record`). Raises
    :class:`~vfiostream.errors.UsageError` for any other address, and what the access itself raises.
    """
    if recording is not None:
        from vfiostream.access.record import recorded  # others need not load it

        return await recorded(address, recording, lambda: open_access(address, timeout=timeout))
    if not timeout > 0:
        raise UsageError(f"a device that may take {timeout:g} s for an operation can do nothing: give it more")
    scheme, _, rest = address.partition(":")
    if scheme == "vfio-user" and rest:
        from vfiostream.access import vfio_user

        return await vfio_user.connect(rest, timeout=timeout)
    if scheme == "vfio" and rest:
        from vfiostream.access import kernel

        return await kernel.connect(rest, timeout=timeout)
    if scheme == "replay" and rest:
        from vfiostream.access.replay import open_replay

        return open_replay(Path(rest))
    raise UsageError(
        f"{address!r} is not the address of a device; write vfio-user:SOCKET, with the path of its socket, or vfio: "
        "and a device of the kernel's, which `vfiostream devices` lists, or replay:FILE, with a record of one"
    )
