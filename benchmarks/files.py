"""Checkpoints, against ``cp`` and ``dd``; guest memory, so that both read and write the same file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.contents import write
from benchmarks.moving import End, store
from benchmarks.pairs import Run
from benchmarks.peers import program, timed
from benchmarks.plan import Plan
from benchmarks.row import Row, compare


def save_to_page_cache(plan: Plan) -> Iterator[Row]:
    """Into a file in memory: a file system on a disk is synchronised by ``save`` whatever happens."""
    with plan.folder() as folder:
        content, file, copy = folder / "content", folder / "checkpoint", folder / "copy"
        write(content, "random", plan.size)
        rounds = plan.rounds(
            {
                "ours": lambda: _save(plan, content, file),
                "cp": lambda: _removing(copy, ["cp", str(content), str(copy)], plan.size),
            }
        )
    yield compare(rounds, "ours", "cp", path="save to page cache", must=1.0, note="from and to files in /dev/shm")


def save_durable(plan: Plan) -> Iterator[Row]:
    with plan.folder() as folder, plan.folder(on_disk=True) as disk:
        content, file, copy = folder / "content", disk / "checkpoint", disk / "copy"
        write(content, "random", plan.size)
        words = ["dd", f"if={content}", f"of={copy}", "bs=1M", "conv=fsync"]
        rounds = plan.rounds(
            {"ours": lambda: _save(plan, content, file), "dd conv=fsync": lambda: _removing(copy, words, plan.size)}
        )
    yield compare(rounds, "ours", "dd conv=fsync", path="save, durable", must=1.5, note="from /dev/shm to a disk")


def restore_from_page_cache(plan: Plan) -> Iterator[Row]:
    """``cp`` onto a file frees the file's pages first and so can't copy into a populated one. What it does then is done
    by ``dd`` in cp's own blocks, without the truncation; ``cp`` itself is shown too.
    """
    blocks = "cp's copy, without freeing pages"
    with plan.folder() as folder:
        content, file, target, copy = (folder / name for name in ("content", "checkpoint", "target", "copy"))
        write(content, "random", plan.size)
        for populated in (target, copy):
            write(populated, "random", plan.size)
        _save(plan, content, file, keep=True)
        rounds = plan.rounds(
            {
                "ours": lambda: _restore(plan, file, target),
                blocks: lambda: timed(
                    [program("dd"), f"if={content}", f"of={copy}", "bs=128K", "conv=notrunc"], plan.size
                ),
                "cp onto a file": lambda: timed([program("cp"), str(content), str(copy)], plan.size),
            }
        )
    path = "restore from page cache into a populated mapping"
    yield compare(
        rounds, "ours", blocks, path=path, must=1.0, note="dd bs=128K conv=notrunc: cp itself frees the pages first"
    )
    yield compare(rounds, "ours", "cp onto a file", path=path, must=None, note="cp itself")


def _save(plan: Plan, content: Path, file: Path, *, keep: bool = False) -> Run:
    end = End("save", guest=plan.size, file=str(content), settings={"chunk": plan.chunk})
    seen = store(end, file)
    if not keep:
        file.unlink()
    return _run(plan, seen)


def _restore(plan: Plan, file: Path, target: Path) -> Run:
    return _run(plan, store(End("restore", guest=plan.size, file=str(target)), file))


def _run(plan: Plan, seen: dict[str, Any]) -> Run:
    return Run(plan.size, seen["ended"] - seen["began"], seen["cpu"])


def _removing(copy: Path, words: list[str], size: int) -> Run:
    """Run a program that makes ``copy`` anew, and remove it."""
    try:
        return timed([program(words[0]), *words[1:]], size)
    finally:
        if copy.exists():
            os.unlink(copy)


MEASUREMENTS = (save_to_page_cache, save_durable, restore_from_page_cache)
