"""Conversations that later requests go on with, by the id of their last response."""

import json
from collections import OrderedDict
from typing import Any

from .errors import ApiError

MAX_RESPONSES = 1024
MAX_BYTES = 64 << 20  # of their messages as JSON; those that conversations share count in each

Messages = list[dict[str, Any]]


class ResponseStore:
    """Keeps them in memory; the ones not used for longest make room for new ones."""

    def __init__(self, most: int = MAX_RESPONSES, most_bytes: int = MAX_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[str, tuple[Messages, int]] = OrderedDict()
        self._num_bytes = 0

    def put(self, id: str, messages: Messages) -> None:
        size = len(json.dumps(messages))
        self._kept[id] = messages, size
        self._num_bytes += size
        while len(self._kept) > self._most or self._num_bytes > self._most_bytes:
            _, (_, size) = self._kept.popitem(last=False)
            self._num_bytes -= size

    def get(self, id: str) -> Messages:
        """The messages up to and with that response. Raises ApiError for one that is not kept."""
        if id not in self._kept:
            raise ApiError(
                400,
                f"previous_response_id: expected a response that is kept, found {id!r:.100}, "
                "which is not (any more); send the whole conversation as input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        self._kept.move_to_end(id)
        return self._kept[id][0]
