"""What becomes of what was chosen for a chunk: the compressor does it, and nothing that was chosen is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.movers import SMALL, machines
from tests.test_migrate import move
from vfiostream.pipeline import outbound
from vfiostream.pipeline.adaptive import Adaptive, Choice
from vfiostream.pipeline.settings import Settings
from vfiostream.protocol.framing import FLAG_ZSTD
from vfiostream.protocol.payload import Compressor, Decompressor

TEXT = b"".join(b"line %d of %d is %d\n" % (n, n * n % 977, n**3 % 65521) for n in range(4000))


def test_each_level_that_is_asked_for_is_used() -> None:
    compressor = Compressor()
    sizes = []
    for level in (-5, 1, 19, -5):
        packed = compressor.compress(TEXT, level)
        assert packed is not None
        assert bytes(Decompressor().content(packed, FLAG_ZSTD, len(TEXT), "here")) == TEXT
        sizes.append(len(packed))
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[0] == sizes[3]


class Raw(Adaptive):
    """Tries one as soon as it may after the first chunk, which is no zeros."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.trials: list[Choice] = []
        self._begun = False

    def choose(self, size: int) -> Choice:
        if not self._begun:
            self._begun = True
            return Choice(size, None, probe=True)
        choice = super().choose(size)
        if choice.level is not None:
            self.trials.append(choice)
        return choice


@pytest.mark.anyio
async def test_a_trial_that_met_zeros_is_made_with_another_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Raw] = []

    def choices(workers: int) -> Raw:
        made.append(Raw(workers))
        return made[-1]

    monkeypatch.setattr(outbound, "Adaptive", choices)
    monkeypatch.setattr(outbound, "WORTH_A_COPY", 1.0)
    async with machines(replace(SMALL, data="zeros")) as (source, target):
        await move(source, target, ours=Settings(compression="adaptive"))
    assert len(made[0].trials) > 1
