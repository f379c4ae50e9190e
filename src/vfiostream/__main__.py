"""``python -m vfiostream``."""

from __future__ import annotations

import sys

from vfiostream.cli import main

sys.exit(main())
