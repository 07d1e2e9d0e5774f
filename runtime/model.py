"""A loaded model: token ids to logits, to tokens, to the text of a chat."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .arguments import whole_number
from .artifact import Artifact, open_artifact
from .devices.driver import driver
from .errors import ArtifactError, InputError
from .fields import MAX_NUMBER
from .generated import GeneratedToken
from .harmony import IDENTITY, Piece
from .machine import choose_threads
from .memory import check_memory, memory_bytes
from .questions import Question, Questions
from .runner import Rows, Runner
from .sampler import Sample, Sampler, check_logit
from .scheduler import Answer, Scheduler
from .stream import Stream
from .tools.functions import Tool
from .tools.loop import MAX_ROUNDS, Executor, ToolLoop

T = TypeVar("T")


def load(
    path: str | Path,
    *,
    context: int | None = None,
    kv_memory: int | None = None,
    threads: int | None = None,
    variant: str | None = None,
    verify: bool = False,
    progress: Callable[[int], object] | None = None,
) -> "Model":
    """Load a compiled artifact; only load those that you trust, their library is code.

    `context`: at most so many positions, to use less memory than the artifact was compiled for.
    `kv_memory`: bytes of keys and values (default: what the context needs, and a few kept points);
    with more, more of earlier prompts is kept, up to what a device allocates at once for a layer.
    On a CPU they are taken as they are used.
    `threads`: CPU threads (default: all cores; more than can run at once are not used, with a
    warning); OpenCL devices have their own. `variant`: which of
    its libraries to run (default: the best for this CPU). `verify`: hash the weights even if this
    copy was verified before; `progress` is told the bytes hashed. Raises ArtifactError for an
    artifact that cannot be used here, InputError for options out of range, OsscompileError without
    the memory or the device that it needs.
    """
    return open_model(path, context, kv_memory, threads, variant, verify, progress)


def open_model(
    path: str | Path,
    context: int | None = None,
    kv_memory: int | None = None,
    threads: int | None = None,
    variant: str | None = None,
    verify: bool = False,
    progress: Callable[[int], object] | None = None,
    sequences: int = 1,
) -> "Model":
    """As `load`; with room for several `sequences` at once."""
    driver()  # first, because where a process ends nothing else works either
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"artifact: expected the path of a folder, found {path!r}")
    if progress is not None and not callable(progress):
        raise InputError(f"progress: expected a function of a number of bytes, found {progress!r}")
    threads = None if threads is None else whole_number("threads", threads)
    artifact = open_artifact(path, verify, progress, variant)
    limit = artifact.manifest.context
    context = limit if context is None else whole_number("context", context, limit)
    if kv_memory is not None:
        kv_memory = whole_number("kv_memory", kv_memory)
        if kv_memory > MAX_NUMBER:
            raise InputError(f"kv_memory: expected at most {MAX_NUMBER} bytes, found more")
    sequences, most = whole_number("sequences", sequences), artifact.manifest.most_wanted
    if sequences > most:
        raise InputError(f"sequences: expected at most {most}, found {sequences}")
    return Model(artifact, context, threads, kv_memory, sequences)


class Model:
    """A model that is ready to run.

    Any thread may use it: calls are served one after the other. A call that is interrupted leaves
    nothing wrong behind, and a process that was forked since the load must load its own.
    """

    def __init__(
        self,
        artifact: Artifact,
        context: int,
        threads: int | None,
        kv_memory: int | None = None,
        sequences: int = 1,
    ) -> None:
        self.manifest = artifact.manifest
        needed = memory_bytes(self.manifest, context, kv_memory, sequences)
        check_memory(self.manifest, context, needed)
        self.variant = artifact.variant.name
        self.context = context
        self.vocab_size = self.manifest.vocab_size
        self._questions = Questions(artifact, context)
        self.tokenizer = self._questions.tokenizer
        self.cached_tokens = 0  # of the last prompt: those that were not computed
        self._turn = 0  # counts the calls that used the cache
        self._certain = True  # whether the last of them ended as its caller was told
        threads = choose_threads(threads)
        self._driver = driver()
        self._driver.call(lambda: self._open(artifact, threads, kv_memory, sequences))

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits after every token: ids [n] -> float32 [n, vocab]. Raises InputError."""
        ids = self._questions.check_ids(token_ids)
        return self._serve(lambda: np.concatenate([*self._score(ids)]))

    def generate(
        self,
        token_ids: Sequence[int],
        *,
        response_format: Mapping[str, object] | None = None,
        max_tokens: int | None = None,
        **options: object,
    ) -> Iterator[GeneratedToken]:
        """Continue a prompt, one token at a time, until a stop id, a stop string or `max_tokens`.

        `options`: the fields of SamplingOptions (temperature, top_p, top_k, min_p, seed, logprobs,
        stop, stop_ids, logit_bias, frequency_penalty, presence_penalty); None: as if it were not
        given. The first four are otherwise the checkpoint's own, `manifest.sampling`. The stop id,
        or the token that completes a stop string, is the last one yielded. Without `max_tokens` the
        context is the limit. The KV cache is kept: a prompt that begins like the one before
        continues there. Another call ends this one: to go on with it then raises InputError.

        `response_format`: what all of the text must be, in the shapes of `chat`. It ends with a
        stop id where the text is whole, or with reason length. Raises InputError for bad arguments,
        before anything is computed, and OsscompileError for a grammar that proves too large later.
        """
        question = self._questions.of_ids(
            token_ids, response_format=response_format, max_tokens=max_tokens, **options
        )
        return Stream(self._generate(question))

    def generate_batch(
        self,
        prompts: Iterable[Sequence[int]],
        *,
        response_format: Mapping[str, object] | None = None,
        max_tokens: int | None = None,
        **options: object,
    ) -> list[list[GeneratedToken]]:
        """Continue several prompts together, as `generate` does each; their answers, in order.

        A step reads the weights once for all of them. What they have in common at the beginning is
        computed once if it came before. With a seed, every answer has it. Raises InputError.
        """
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
            raise InputError(f"prompts: expected lists of token ids, found {prompts!r:.100}")
        questions = [
            self._questions.of_ids(
                ids, response_format=response_format, max_tokens=max_tokens, **options
            )
            for ids in prompts
        ]
        told: list[list[GeneratedToken]] = [[] for _ in questions]
        answers = [
            Answer(question, self._questions.sampler(question), tokens.append)
            for question, tokens in zip(questions, told, strict=True)
        ]
        self._serve(lambda: self._answer_all(answers))
        return told

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        reasoning: str = "medium",
        current_date: str | None = "today",
        identity: str = IDENTITY,
        tools: Sequence[Tool] = (),
        builtin_tools: Sequence[str] | Mapping[str, str | None] = (),
        tool_choice: str | Mapping[str, object] = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, object] | None = None,
        template: str = "harmony",
        max_tokens: int | None = None,
        **options: object,
    ) -> Iterator[Piece]:
        """Answer a conversation, in pieces as they are generated.

        `messages`: as in OpenAI's chat API, {"role": system, developer, user, assistant or tool,
        "content": text}, with tool_calls, tool_call_id, reasoning; also what `as_messages` makes of
        the pieces of an answer. `reasoning`: low, medium or high; `current_date`: YYYY-MM-DD, today
        or None; `identity`: who the model is told to be. `tools` have OpenAI's shapes,
        or one is a Python function, described by its signature and docstring;
        `builtin_tools`: of browser and python, perhaps a dict of descriptions. No tool is run here:
        see `run_tools`. `tool_choice`: auto, none (no call), or required, or {"type": "function",
        "function": {"name": ...}}: it may reason, and then calls one of them, or this one.
        `parallel_tool_calls`: False ends the answer with its first call; the models call one at a
        time, but may go on.
        `template`: harmony, the format that the models were trained on, or checkpoint, to render
        the prompt with the chat template that the checkpoint came with (it needs jinja2).

        `response_format`: what the text on channel final must be, in OpenAI's shapes: {"type":
        "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": ...,
        "schema": ...}}, strict or not, or {"type": "grammar", "syntax": "regex" or "lark",
        "definition": ...}. The arguments of a function with "strict": true are what its parameters
        say. Only tokens that obey are chosen, and none ends such a text before it is whole; what is
        cut off has the reason length. The analysis is free. It needs llguidance.

        Every piece has a channel and a text, which is "" where there is none: Reasoning and Text,
        ToolCall and Arguments, and last Finish, with the reason and what it took; with `logprobs`
        each has those of its tokens. `max_tokens` and `options` as in `generate`, but `<|return|>`,
        `<|call|>` and `<|endoftext|>` end an answer, whatever ends other texts of the checkpoint,
        and `stop` is looked for in the text of channel final alone. Raises InputError as there.
        """
        question = self._questions.of_messages(
            messages,
            reasoning=reasoning,
            current_date=current_date,
            identity=identity,
            tools=tools,
            builtin_tools=builtin_tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            response_format=response_format,
            template=template,
            max_tokens=max_tokens,
            **options,
        )
        return Stream(self._chat(question))

    def run_tools(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Callable[..., object]] = (),
        *,
        python: Executor | None = None,
        max_rounds: int = MAX_ROUNDS,
        **options: object,
    ) -> ToolLoop:
        """Answer a conversation with tools, and run what the model calls until it needs no more.

        `tools`: Python functions; `python`: what runs code of the builtin tool python, such as a
        PythonSandbox, without which there is none. `max_rounds`: answers at most; calls of the last
        one are not run. `options`: those of `chat`; a `tool_choice` that forces a call does so in
        the first answer. See ToolLoop for what it yields; its `messages` are the whole conversation
        at any time. Raises InputError, before anything is computed or run.
        """
        return ToolLoop(
            self.chat, self.context, self.tokenizer, messages, tools, python, max_rounds, options
        )

    def prefill(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits [vocab] float32 after a prompt, for samplers of one's own; `decode` goes on.

        Raises InputError for ids that the context cannot hold.
        """
        ids = self._questions.check_ids(token_ids)
        return self._serve(lambda: self._host_logits(self._prefill, ids))

    def decode(self, token_id: int) -> np.ndarray:
        """Logits [vocab] float32 after one more token. Raises InputError at the context's end, and
        after a call that was interrupted."""
        (checked,) = self._questions.check_ids([token_id])
        if not self._certain:
            raise InputError(
                "decode: expected a call before this one that ended, found one that did not: it is "
                "uncertain what the token would follow; call `prefill` again"
            )
        return self._serve(lambda: self._host_logits(self._decode, checked))

    def forget(self) -> None:
        """Empty the KV cache; generations that are under way end."""
        self._serve(self._forget)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; what looks like a special token stays text."""
        tokenizer = self._questions.need_tokenizer("encode")
        if not isinstance(text, str):
            raise InputError(f"encode: expected text, found {text!r}")
        return tokenizer.encode(text)

    def _logits_in_pieces(self, token_ids: Sequence[int]) -> Iterator[np.ndarray]:
        """As `logits`, a few rows at a time: those of a long text are gigabytes. Another call ends
        it."""
        pieces = self._score(self._questions.check_ids(token_ids))
        while (piece := self._serve(lambda: next(pieces, None))) is not None:
            yield piece

    def _serve(self, work: Callable[[], T]) -> T:
        """Do what uses the cache, on the device's thread. A caller that is interrupted does not
        know how far it went."""
        try:
            result = self._driver.call(work)
            self._certain = True
            return result
        except BaseException:  # also once it has ended: the caller sees no result
            self._certain = False
            raise

    def _generate(self, question: Question) -> Generator[GeneratedToken, None, None]:
        sampler, stream = self._questions.sampler(question), question.token_stream()
        turn, cached, sample = self._serve(lambda: self._first_sample(sampler, question.ids))
        stream.begin(cached)
        while True:
            token = stream.push(sample)
            yield token
            if token.finish_reason is not None:
                return
            self._check_turn(turn)
            sample = self._serve(partial(self._next_sample, turn, sampler, sample.token_id))

    def _chat(self, question: Question) -> Generator[Piece, None, None]:
        maker = question.piece_maker()
        for token in self._generate(question):
            yield from maker.push(token)
            if maker.ended:
                return

    def _check_turn(self, turn: int) -> None:
        if self._turn != turn:
            raise InputError(
                "generation: expected to be the last call that uses this model, found a later "
                "one, which took over the KV cache; finish one answer before the next, or "
                "load the model twice"
            )

    # From here to `_run`: on the device's thread.

    def _open(
        self, artifact: Artifact, threads: int, kv_memory: int | None, sequences: int
    ) -> None:
        reserved = self._questions.reserved
        self._runner = Runner(artifact, self.context, kv_memory, threads, sequences, reserved)
        self._sequence = self._runner.cache.start()

    def _score(self, ids: list[int]) -> Iterator[np.ndarray]:
        self._turn += 1
        turn = self._turn
        self._sequence.start_apart()
        for start in range(0, len(ids), self.manifest.most_wanted):
            self._check_turn(turn)
            part = ids[start : start + self.manifest.most_wanted]
            logits = self._runner.device.numpy(self._step(part, len(part)))[: len(part)]
            yield self._finite(logits).copy()

    def _answer_all(self, answers: list[Answer]) -> None:
        self._turn += 1
        self._sequence.keep()
        self._sequence.restart()
        Scheduler(self._runner, self.manifest.chunk, self.manifest.most_wanted).run(answers)

    def _host_logits(self, compute: Callable[[Any], Any], argument: object) -> np.ndarray:
        self._turn += 1
        return self._finite(self._runner.device.numpy(compute(argument))).reshape(-1)

    def _finite(self, logits: np.ndarray) -> np.ndarray:
        """The logits. Raises ArtifactError for what is not a number: what the cache holds then
        would spoil later answers, and is forgotten."""
        try:
            check_logit(float(logits.max()), int(logits.argmax()) % self.vocab_size)
        except ArtifactError:
            self._forget()
            raise
        return logits

    def _forget(self) -> None:
        self._turn += 1
        self._runner.cache.clear()

    def _first_sample(self, sampler: Sampler, ids: list[int]) -> tuple[int, int, Sample]:
        """The turn that a generation has, how many tokens were cached, and the first one."""
        self._turn += 1
        sample = self._sample(sampler, self._prefill(ids))
        return self._turn, self.cached_tokens, sample

    def _next_sample(self, turn: int, sampler: Sampler, token_id: int) -> Sample:
        self._check_turn(turn)  # again: another thread's call may have come first
        return self._sample(sampler, self._decode(token_id))

    def _sample(self, sampler: Sampler, logits: Any) -> Sample:
        try:
            (sample,) = self._runner.sample(logits, [sampler])
            if isinstance(sample, ArtifactError):
                raise sample
        except ArtifactError:  # not a number: what the cache holds would spoil the next answer
            self._forget()
            raise
        if sampler.error is not None:
            raise sampler.error
        return sample

    def _prefill(self, ids: list[int]) -> Any:
        """Extend the cache to `ids` -> the device's logits [1, vocab] after the last. At least one
        is computed."""
        kept = self.cached_tokens = self._sequence.reuse(ids[:-1])
        logits = None
        for start in range(kept, len(ids), self.manifest.chunk):
            part = ids[start : start + self.manifest.chunk]
            logits = self._step(part)
        self._sequence.keep()
        return logits

    def _decode(self, token_id: int) -> Any:
        """Append one token -> the device's logits [1, vocab]. Raises InputError without room."""
        if self._sequence.length >= self.context:
            raise InputError(
                f"decode: expected room in the context of {self.context} positions, found none; "
                "call `forget`, or load with a larger context"
            )
        return self._step([token_id])

    def _step(self, ids: Sequence[int], wanted: int = 1) -> Any:
        """Append tokens -> the device's logits [wanted, vocab] of the last ones."""
        return self._runner.step([Rows(self._sequence, ids, wanted)])
