"""What has to be let go of, and is with ``async with``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closing(ABC):
    """Something open. Each contract says what letting go of it means."""

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of it; never raises, may be called again and under cancellation."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()
