"""The plots of ``docs/performance.md``: SVG on white, so that they can be read on any page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import pygal
from pygal.style import Style

from benchmarks.row import Row

INK = "#1f2328"
# Light enough for the figures that are printed on them.
REACHED, MISSED = "#86cf9f", "#f0a392"
OURS, THEIRS = "#8fbde0", "#c5cad2"


def draw(rows: Sequence[Row], folder: Path) -> Mapping[str, Path]:
    """Draw what ``rows`` have into ``folder``; returns titles and files, in the order in which they are shown."""
    folder.mkdir(parents=True, exist_ok=True)
    charts = {
        "Medians, as multiples of what must be reached (green: reached; 5 stands for more, too)": (
            "reached.svg",
            _reached([row for row in rows if row.must is not None]),
        ),
        "CPU seconds per GB": ("cpu.svg", _cpu([row for row in rows if row.unit == "CPU s/GB" and row.must == 1.4])),
        "Throughput against size": ("size.svg", _size([row for row in rows if row.plot == "size"])),
    }
    drawn: dict[str, Path] = {}
    for title, (name, chart) in charts.items():
        if chart is not None:
            chart.uuid = name.partition(".")[0]  # else it differs from run to run
            chart.add_xml_filter(_still)
            (folder / name).write_text(chart.render(is_unicode=True) + "\n")
            drawn[title] = folder / name
    return drawn


def score(row: Row) -> float:
    """How much of what it must reach a row reached: 1 is all of it, whichever way the row goes."""
    assert row.must is not None
    median = row.spread.median
    if row.sense == "least":
        return median / row.must
    if row.sense == "most":
        return row.must / max(median, row.must / _HIGHEST)
    return 1.0 if row.verdict == "reached" else (1 + row.must) / max(median, 1 / median)


_HIGHEST = 5.0
"""Beyond it a bar says nothing more, and makes the others short."""


def _style(*colours: str) -> Style:
    return Style(
        background="white",
        plot_background="white",
        foreground=INK,
        foreground_strong=INK,
        foreground_subtle="#c9ced6",
        colors=colours,
        font_family="sans-serif",
        label_font_size=12,
        major_label_font_size=12,
        value_font_size=12,
        title_font_size=15,
        legend_font_size=12,
        opacity=1,
        opacity_hover=1,
        value_colors=(INK,) * len(colours),
    )


def _options(**more: Any) -> dict[str, Any]:
    return {"js": (), "print_values": True, "truncate_label": -1, "truncate_legend": -1, **more}


def _still(root: Element) -> Element:
    """The drawing without the scripts, and the date, that it comes with."""
    for parent in list(root.iter()):
        for child in list(parent):
            if not isinstance(child.tag, str) or child.tag.endswith("script"):  # a comment has no tag
                parent.remove(child)
    return root


def _reached(rows: Sequence[Row]) -> pygal.HorizontalBar | None:
    if not rows:
        return None
    chart = pygal.HorizontalBar(
        style=_style(REACHED),
        x_title="times what must be reached",
        width=1200,
        height=90 + 24 * len(rows),
        range=(0, _HIGHEST),
        show_legend=False,
        formatter=lambda value: f"{value:.2f}",
        y_labels=[0, 1, 2, 3, 4, 5],
        **_options(),
    )
    ordered = list(rows)[::-1]  # they are drawn from the bottom
    chart.x_labels = [f"{row.path} / {row.against}" if row.against else row.path for row in ordered]
    colours = {"reached": REACHED, "not reached": MISSED, "for information": THEIRS}
    chart.add("", [{"value": min(score(row), _HIGHEST), "color": colours[row.verdict]} for row in ordered])
    return chart


def _cpu(rows: Sequence[Row]) -> pygal.Bar | None:
    if not rows:
        return None
    chart = pygal.HorizontalBar(
        style=_style(OURS, THEIRS),
        x_title="CPU seconds per GB, one side; less is better",
        width=1100,
        height=110 + 44 * len(rows),
        range=(0, 1.1 * max(max(row.ours + row.theirs) for row in rows)),
        legend_at_bottom=True,
        formatter=lambda value: f"{value:.3f}",
        **_options(),
    )
    ordered = list(rows)[::-1]
    chart.x_labels = [row.path.removeprefix("CPU of the ") for row in ordered]
    chart.add("vfiostream, all checks on", [_median(row.ours) for row in ordered])
    chart.add("C, no checks", [_median(row.theirs) for row in ordered])
    return chart


def _size(rows: Sequence[Row]) -> pygal.Bar | None:
    if not rows:
        return None
    chart = pygal.Bar(
        style=_style(OURS),
        x_title="guest memory, MiB",
        y_title="GB/s",
        width=800,
        height=420,
        range=(0, 1.15 * max(row.spread.median for row in rows)),
        show_legend=False,
        formatter=lambda value: f"{value:.2f}",
        **_options(),
    )
    chart.x_labels = [f"{row.at:g}" for row in rows]
    chart.add("vfiostream", [row.spread.median for row in rows])
    return chart


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
