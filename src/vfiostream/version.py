"""The package's version; the format's and the interface's are others."""

from __future__ import annotations

__version__ = "0.1.0"
SOFTWARE = f"vfiostream {__version__}"
