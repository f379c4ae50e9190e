"""How devices are reached: the contract, and one module for each way."""

from __future__ import annotations

from vfiostream.access.contract import Access
from vfiostream.errors import UsageError


async def open_access(address: str, *, timeout: float = 60.0) -> Access:
    """Open the device at ``address``: ``vfio-user:SOCKET``, with the path of the socket its process listens on, or
    ``vfio:`` and one of the kernel's, as :mod:`vfiostream.access.kernel_open` has them.

    ``timeout`` is how many seconds the device may take for one operation. Raises
    :class:`~vfiostream.errors.UsageError` for any other address, and what the access itself raises.
    """
    if not timeout > 0:
        raise UsageError(f"a device that may take {timeout:g} s for an operation can do nothing: give it more")
    scheme, _, rest = address.partition(":")
    if scheme == "vfio-user" and rest:
        from vfiostream.access import vfio_user  # others need not load it

        return await vfio_user.connect(rest, timeout=timeout)
    if scheme == "vfio" and rest:
        from vfiostream.access import kernel

        return await kernel.connect(rest, timeout=timeout)
    raise UsageError(
        f"{address!r} is not the address of a device; write vfio-user:SOCKET, with the path of its socket, or vfio: "
        "and a device of the kernel's, which `vfiostream devices` lists"
    )
