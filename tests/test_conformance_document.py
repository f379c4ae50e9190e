"""The rules in docs/conformance.md are those of the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_rules_are_up_to_date() -> None:
    script = subprocess.run(
        [sys.executable, ROOT / "scripts" / "rules", "--check"], capture_output=True, text=True, check=False
    )
    assert script.returncode == 0, script.stderr
