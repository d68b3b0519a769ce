"""What is loaded when it is first asked for, once, where it holds up nobody."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class LoadedOnce(Generic[T]):
    """Something that takes long to load.

    Args:
        load: Loads it; called in a thread of its own.
    """

    def __init__(self, load: Callable[[], T]) -> None:
        self._load = load
        self._loaded: asyncio.Future[T] | None = None

    async def get(self) -> T:
        """Return it, loaded by the first who asks; the others wait. What loading raises is raised, and the next one
        tries again.
        """

        def load_alone() -> T:
            torch.set_num_threads(1)  # helpers of this thread would wait beside the engine's
            return self._load()

        if self._loaded is None:
            self._loaded = asyncio.get_running_loop().run_in_executor(None, load_alone)
        try:
            return await asyncio.shield(self._loaded)
        except Exception:
            self._loaded = None  # the next one may have more luck
            raise
