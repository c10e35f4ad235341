"""A child process that must not outlive the one that started it."""

import asyncio
import os


async def outlived(parent: int) -> None:
    """Returns when the process `parent`, the caller's parent at the start, is gone.

    A killed parent sends no signal; its children are handed to another process, which shows.
    """
    while os.getppid() == parent:
        await asyncio.sleep(1.0)
