"""Pieces of an answer -> output items of the Responses API, and the events that tell them."""

import uuid
from collections.abc import Iterator
from typing import Any

from ..harmony import Arguments, Piece, Reasoning, Text, ToolCall
from .logprobs import Logprobs

PHASES = {"commentary": "commentary", "final": "final_answer"}  # by channel

Event = dict[str, Any]


class OutputItems:
    """The items, which begin and end one after the other. Every event comes with its `type` first;
    numbers of the sequence are given by who sends them."""

    def __init__(self, logprobs: Logprobs | None) -> None:
        self.items: list[dict[str, Any]] = []
        self._logprobs = logprobs
        self._open: _OpenItem | None = None

    def push(self, piece: Piece) -> Iterator[Event]:
        if isinstance(piece, Reasoning):
            yield from self._push_text(piece, _ReasoningItem)
        elif isinstance(piece, Text):
            yield from self._push_text(piece, _MessageItem)
        elif isinstance(piece, ToolCall):
            yield from self._begin(_CallItem(piece))
        elif isinstance(piece, Arguments):
            assert self._open is not None
            yield from self._open.push(piece.delta, [])

    def finish(self, status: str) -> Iterator[Event]:
        """End the item that is open. status: completed or incomplete."""
        if self._open is not None:
            yield from self._open.finish(status)
            self._open = None

    def _push_text(
        self, piece: Piece, kind: "type[_ReasoningItem] | type[_MessageItem]"
    ) -> Iterator[Event]:
        if not isinstance(self._open, kind) or piece.begins:
            yield from self._begin(kind(piece))
        assert self._open is not None
        logprobs = [] if self._logprobs is None else self._logprobs.of_content(piece.logprobs)
        if piece.text or logprobs:
            yield from self._open.push(piece.text, logprobs)

    def _begin(self, item: "_OpenItem") -> Iterator[Event]:
        yield from self.finish("completed")
        item.at["output_index"] = len(self.items)
        self.items.append(item.item)
        self._open = item
        yield from item.begin()


class _OpenItem:
    """An item that grows: `item` is what it is so far, `at` says where it is in every event."""

    def __init__(self, prefix: str, item: dict[str, Any]) -> None:
        id = f"{prefix}_{uuid.uuid4().hex}"
        self.item = {"id": id, **item}
        self.at: dict[str, Any] = {"item_id": id}

    def begin(self) -> Iterator[Event]:
        yield self._whole("response.output_item.added")

    def push(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        raise NotImplementedError

    def finish(self, status: str) -> Iterator[Event]:
        self.item["status"] = status
        yield self._whole("response.output_item.done")

    def _whole(self, type: str) -> Event:
        index = self.at["output_index"]
        return {"type": type, "output_index": index, "item": {**self.item}}


class _TextItem(_OpenItem):
    """An item with one part of text. `kind`: what events about it are called by."""

    kind: str

    def __init__(self, prefix: str, item: dict[str, Any], part: dict[str, Any]) -> None:
        super().__init__(prefix, item | {"content": []})
        self._part = part
        self.at["content_index"] = 0

    def begin(self) -> Iterator[Event]:
        yield from super().begin()
        self.item["content"] = [self._part]
        yield {"type": "response.content_part.added", **self.at, "part": {**self._part}}

    def push(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        self._part["text"] += text
        yield {"type": f"response.{self.kind}.delta", **self.at, "delta": text}

    def finish(self, status: str) -> Iterator[Event]:
        yield {"type": f"response.{self.kind}.done", **self.at, "text": self._part["text"]}
        yield {"type": "response.content_part.done", **self.at, "part": {**self._part}}
        yield from super().finish(status)


class _ReasoningItem(_TextItem):
    kind = "reasoning_text"

    def __init__(self, piece: Piece) -> None:
        item = {"type": "reasoning", "summary": [], "status": "in_progress"}
        super().__init__("rs", item, {"type": self.kind, "text": ""})


class _MessageItem(_TextItem):
    kind = "output_text"

    def __init__(self, piece: Piece) -> None:
        item = {"type": "message", "role": "assistant", "status": "in_progress"}
        phase = PHASES.get(piece.channel)
        part = {"type": self.kind, "text": "", "annotations": [], "logprobs": []}
        super().__init__("msg", item if phase is None else item | {"phase": phase}, part)

    def push(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        self._part["logprobs"] += logprobs
        for event in super().push(text, logprobs):
            yield event | {"logprobs": logprobs}

    def finish(self, status: str) -> Iterator[Event]:
        for event in super().finish(status):
            is_text = event["type"] == "response.output_text.done"
            yield event | {"logprobs": self._part["logprobs"]} if is_text else event


class _CallItem(_OpenItem):
    def __init__(self, piece: ToolCall) -> None:
        # an id is that of no other answer: clients keep the calls of a conversation by it
        call = {"call_id": f"call_{uuid.uuid4().hex}", "name": piece.name, "arguments": ""}
        super().__init__("fc", {"type": "function_call", **call, "status": "in_progress"})

    def push(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        self.item["arguments"] += text
        yield {"type": "response.function_call_arguments.delta", **self.at, "delta": text}

    def finish(self, status: str) -> Iterator[Event]:
        arguments, name = self.item["arguments"], self.item["name"]
        done = {"arguments": arguments, "name": name}
        yield {"type": "response.function_call_arguments.done", **self.at, **done}
        yield from super().finish(status)
