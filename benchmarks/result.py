"""What one run of benchmarks found, as it is kept: a file of JSON, named by date and commit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.plan import CannotRun
from benchmarks.row import Row

FORMAT = 1
FOLDER = Path(__file__).with_name("results")


@dataclass(slots=True)
class Group:
    """One module's part."""

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """What could not run, and why."""
    table: list[dict[str, Any]] = field(default_factory=list)
    """Lines of a table of its own, for what is no comparison with a bar."""


@dataclass(slots=True)
class Result:
    """One run."""

    when: str
    """UTC, as ISO 8601 has it, to the second."""
    commit: str
    command: str
    pairs: int
    size: int
    """Bytes that were moved, where a row does not say otherwise."""
    machine: Mapping[str, str]
    groups: dict[str, Group] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(group.failures for group in self.groups.values())

    def write(self, folder: Path) -> Path:
        """Keep it; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.when.replace(':', '')}-{self.commit}.json"
        groups = {
            name: {
                "rows": [row.as_json() for row in group.rows],
                "failures": group.failures,
                "table": _rounded(group.table),
            }
            for name, group in self.groups.items()
        }
        head = {name: getattr(self, name) for name in ("when", "commit", "command", "pairs", "size")}
        file.write_text(_dump({"format": FORMAT, **head, "machine": dict(self.machine), "groups": groups}))
        return file

    @classmethod
    def read(cls, file: Path) -> Result:
        """What :meth:`write` kept. Raises :class:`~benchmarks.plan.CannotRun` for another format."""
        stored = json.loads(file.read_text())
        if stored.pop("format", None) != FORMAT:
            raise CannotRun(f"{file} is of another format than {FORMAT}: remove it")
        groups = {
            name: Group([Row.from_json(row) for row in group["rows"]], group["failures"], group["table"])
            for name, group in stored.pop("groups").items()
        }
        return cls(**stored, groups=groups)


def newest(results: Iterable[Result]) -> dict[str, Result]:
    """For each group, the newest result that has it."""
    found: dict[str, Result] = {}
    for result in sorted(results, key=lambda result: result.when):
        found.update(dict.fromkeys(result.groups, result))
    return found


def _rounded(value: Any) -> Any:
    """Numbers of four digits: more were not measured."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return value


def _dump(value: dict[str, Any]) -> str:
    """JSON with a line for each row, so that two files can be compared and are small."""
    text = json.dumps({**value, "groups": None}, indent=1)
    groups = []
    for name, group in value["groups"].items():
        parts = [
            f"   {json.dumps(key)}: [" + ",".join(f"\n    {json.dumps(line)}" for line in lines) + "]"
            for key, lines in group.items()
        ]
        groups.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(parts) + "}")
    return text.replace('"groups": null', '"groups": {\n' + ",\n".join(groups) + "}") + "\n"
