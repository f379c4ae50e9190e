"""Move the state of a VFIO device from one host to another while it runs, or into a file and back.

The names an agent needs, in ``docs/library.md``; everything else is in the modules.
"""

from vfiostream.access.record import Recording
from vfiostream.checkpoint import inspect, restore, save, verify
from vfiostream.compatibility import check
from vfiostream.description import description_text, read_description
from vfiostream.devices import open_device
from vfiostream.devices.contract import DescribedDevice, Device
from vfiostream.errors import VfiostreamError
from vfiostream.guest import Guest, GuestRange
from vfiostream.migrate import receive, send
from vfiostream.pipeline.bandwidth import Bandwidth
from vfiostream.pipeline.progress import Progress, Summary
from vfiostream.pipeline.settings import Settings
from vfiostream.policy import Precopy
from vfiostream.transports import connect, listen
from vfiostream.transports.contract import Listener, Transport
from vfiostream.transports.credentials import Credentials
from vfiostream.transports.options import Options
from vfiostream.version import __version__

__all__ = [
    "Bandwidth",
    "Credentials",
    "DescribedDevice",
    "Device",
    "Guest",
    "GuestRange",
    "Listener",
    "Options",
    "Precopy",
    "Progress",
    "Recording",
    "Settings",
    "Summary",
    "Transport",
    "VfiostreamError",
    "__version__",
    "check",
    "connect",
    "description_text",
    "inspect",
    "listen",
    "open_device",
    "read_description",
    "receive",
    "restore",
    "save",
    "send",
    "verify",
]
