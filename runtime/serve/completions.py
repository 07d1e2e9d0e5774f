"""/v1/completions: texts or token ids, and what follows them."""

import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import Request
from starlette.responses import Response

from ..errors import InputError
from ..generated import GeneratedToken
from .answers import Answers
from .beside import beside
from .chat import usage_object
from .completion_body import CompletionBody
from .logprobs import CompletionLogprobs
from .replies import DONE, StreamedReply, event, whole_reply, with_error
from .service import Service


async def create_completion(service: Service, body: CompletionBody, request: Request) -> Response:
    service.check_model(body.model)
    if body.echo and body.logprobs is not None:
        raise InputError(
            "echo: expected no logprobs beside it, found some; those of a prompt are not told"
        )
    size = len(await request.body())
    prompts = [await beside(size, service.prompt_ids, prompt) for prompt in _prompts(body)]
    completion = await beside(size, _Completion, service, body, prompts)
    choices = [body.options(choice) for choice in range(body.n or 1)]
    answers = await service.desk.ask([(ids, choices) for ids in prompts], size)
    if body.stream:
        return StreamedReply(with_error(completion.events(answers)), answers)
    again = partial(create_completion, service, body, request)
    return await whole_reply(request, answers, completion.whole(answers), again)


def _prompts(body: CompletionBody) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return [*prompt]


class _Completion:
    """The answer to one request."""

    def __init__(self, service: Service, body: CompletionBody, prompts: list[list[int]]) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }
        texts = [service.tokenizer.decode(ids) if body.echo else "" for ids in prompts]
        self._begun = [text for text in texts for _ in range(body.n or 1)]
        self._logprobs = (
            None
            if body.logprobs is None
            else [CompletionLogprobs(service.logprobs, len(text)) for text in self._begun]
        )
        self._special = frozenset(service.tokenizer.special.values())
        options = body.stream_options
        self._tells_usage = bool(options and options.include_usage)

    async def whole(self, answers: Answers) -> dict[str, Any]:
        told: list[list[GeneratedToken]] = [[] for _ in self._begun]
        async for index, token in answers.told():
            told[index].append(token)
        choices = [
            self._choice(index, "".join([begun, *(t.text for t in tokens)]), tokens)
            for index, (begun, tokens) in enumerate(zip(self._begun, told, strict=True))
        ]
        return self._head | {"choices": choices, "usage": usage_object(answers.usage)}

    async def events(self, answers: Answers) -> AsyncIterator[bytes]:
        for index, text in enumerate(self._begun):
            if text:
                yield self._chunk([self._choice(index, text, [])])
        async for index, token in answers.told():
            yield self._chunk([self._choice(index, token.text, [token])])
        if self._tells_usage:
            yield event(self._head | {"choices": [], "usage": usage_object(answers.usage)})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        chunk = self._head | {"choices": choices}
        return event(chunk | {"usage": None} if self._tells_usage else chunk)

    def _choice(self, index: int, text: str, tokens: list[GeneratedToken]) -> dict[str, Any]:
        reason = tokens[-1].finish_reason if tokens else None
        if reason == "stop" and tokens[-1].token_id in self._special:
            tokens = tokens[:-1]  # it ended the answer, and is none of its text
        logprobs = None if self._logprobs is None else self._logprobs[index].of_tokens(tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
