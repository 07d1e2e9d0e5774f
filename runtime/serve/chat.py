"""/v1/chat/completions: messages, and the answers to them in choices."""

import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import Request
from starlette.responses import Response

from ..harmony import Arguments, Finish, Piece, Reasoning, Text, ToolCall
from ..usage import Usage
from .answers import Answers
from .chat_body import ChatBody
from .logprobs import Logprobs
from .replies import DONE, StreamedReply, event, whole_reply, with_error
from .service import Service


async def create_chat(service: Service, body: ChatBody, request: Request) -> Response:
    service.check_model(body.model)
    choices = [body.options(choice) for choice in range(body.n or 1)]
    answers = await service.desk.ask([(body.messages, choices)], len(await request.body()))
    chat = _Chat(service, body)
    if body.stream:
        return StreamedReply(with_error(chat.events(answers)), answers)
    again = partial(create_chat, service, body, request)
    return await whole_reply(request, answers, chat.whole(answers), again)


class _Chat:
    """The answer to one request."""

    def __init__(self, service: Service, body: ChatBody) -> None:
        name = uuid.uuid4().hex
        self._head = {
            "id": f"chatcmpl-{name}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }
        logprobs = service.logprobs if body.logprobs else None
        self._choices = [_Choice(f"call_{name[:20]}{i}_", logprobs) for i in range(body.n or 1)]
        options = body.stream_options
        self._tells_usage = bool(options and options.include_usage)

    async def whole(self, answers: Answers) -> dict[str, Any]:
        async for index, piece in answers.told():
            self._choices[index].push(piece)
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": choice.told_logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return self._head | {"choices": choices, "usage": usage_object(answers.usage)}

    async def events(self, answers: Answers) -> AsyncIterator[bytes]:
        for index in range(len(self._choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, piece in answers.told():
            choice = self._choices[index]
            before = len(choice.logprobs)
            delta = choice.push(piece)
            if isinstance(piece, Finish):
                yield self._chunk(index, {}, finish_reason=piece.reason)
            elif delta:
                yield self._chunk(index, delta, choice.told_logprobs(choice.logprobs[before:]))
        if self._tells_usage:
            yield event(self._with_choices([]) | {"usage": usage_object(answers.usage)})
        yield DONE

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: object = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        chunk = self._with_choices([choice])
        return event(chunk | {"usage": None} if self._tells_usage else chunk)

    def _with_choices(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk", "choices": choices}


class _Choice:
    """One answer, told in pieces: what they add to its message.

    Text before calls and text of the answer are its content; harmony has messages of their own for
    them, between which there is a blank line here.
    """

    def __init__(self, call_prefix: str, logprobs: Logprobs | None) -> None:
        self._call_prefix, self._told_by = call_prefix, logprobs
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    def push(self, piece: Piece) -> dict[str, Any]:
        """The delta; it may be empty."""
        if isinstance(piece, Reasoning):
            text = _append(self._reasoning, piece)
            return {"reasoning": text, "reasoning_content": text} if text else {}
        if isinstance(piece, Text):
            if self._told_by is not None:
                self.logprobs += self._told_by.of_content(piece.logprobs)
            text = _append(self._content, piece)
            return {"content": text} if text else {}
        if isinstance(piece, ToolCall):
            return self._begin_call(piece)
        if isinstance(piece, Arguments):
            call = self._calls[-1]
            call["function"]["arguments"] += piece.delta
            function = {"arguments": piece.delta}
            return {"tool_calls": [{"index": len(self._calls) - 1, "function": function}]}
        assert isinstance(piece, Finish)
        self.finish_reason = piece.reason
        return {}

    def message(self) -> dict[str, Any]:
        content, reasoning = "".join(self._content), "".join(self._reasoning) or None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not self._calls else None,
            "refusal": None,
            "annotations": [],
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        }
        return message | {"tool_calls": self._calls} if self._calls else message

    def told_logprobs(self, logprobs: list[dict[str, Any]]) -> dict[str, Any] | None:
        return None if self._told_by is None else {"content": logprobs, "refusal": None}

    def _begin_call(self, piece: ToolCall) -> dict[str, Any]:
        index = len(self._calls)
        # an id is that of no other answer: clients keep the calls of a conversation by it
        call = {"id": f"{self._call_prefix}{index}", "type": "function"}
        self._calls.append(call | {"function": {"name": piece.name, "arguments": ""}})
        function = {"name": piece.name, "arguments": ""}
        return {"tool_calls": [{"index": index, **call, "function": function}]}


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _append(texts: list[str], piece: Piece) -> str:
    """The text that a piece adds."""
    text = f"\n\n{piece.text}" if piece.begins and any(texts) else piece.text
    texts.append(text)
    return text
