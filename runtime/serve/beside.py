"""Work that is too long for the event loop."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

LONG_BODY = 4 << 10  # bytes of a request that takes milliseconds to tokenise

T = TypeVar("T")
Work = ParamSpec("Work")


async def beside(
    size: int, work: Callable[Work, T], *arguments: Work.args, **options: Work.kwargs
) -> T:
    """Do work on a body of `size` bytes; if that is long, beside the event loop, so that others are
    told their tokens meanwhile."""
    if size < LONG_BODY:
        return work(*arguments, **options)
    return await asyncio.to_thread(work, *arguments, **options)
