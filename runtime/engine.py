"""A loaded model: token ids to logits, to tokens, to the text of a chat."""

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .arguments import prompt_ids, sampling_options, whole_number
from .artifact import Artifact, open_artifact
from .chooser import Chooser
from .devices.driver import driver, forbid_fork
from .devices.launch_devices import LAUNCH_DEVICES, LaunchDevice
from .devices.program import read_programs
from .devices.tvm_cpu import Device
from .devices.tvm_device import TensorDevice
from .errors import ArtifactError, InputError
from .generated import GeneratedToken, generated_pieces
from .harmony import (
    IDENTITY,
    Piece,
    begun_answer,
    render_chat,
    render_template,
    stop_ids,
)
from .kv_cache import KVCache, PageCounts, page_counts
from .machine import choose_threads
from .memory import PROCESS_BYTES, check_memory, memory_bytes
from .sampler import Sample, Sampler, check_logit, reserved_ids
from .sampling_options import SamplingOptions
from .stop_strings import TextStream
from .tokenizer import Tokenizer
from .usage import Usage

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
    with more, more of earlier prompts is kept. On a CPU they are taken as they are used.
    `threads`: CPU threads (default: all cores; more than can run at once are not used, with a
    warning); OpenCL devices have their own. `variant`: which of
    its libraries to run (default: the best for this CPU). `verify`: hash the weights even if this
    copy was verified before; `progress` is told the bytes hashed. Raises ArtifactError for an
    artifact that cannot be used here, InputError for options out of range, OsscompileError without
    the memory or the device that it needs.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"artifact: expected the path of a folder, found {path!r}")
    threads = None if threads is None else whole_number("threads", threads)
    artifact = open_artifact(path, verify, progress, variant)
    limit = artifact.manifest.context
    context = limit if context is None else whole_number("context", context, limit)
    if kv_memory is not None:
        kv_memory = whole_number("kv_memory", kv_memory)
    return Model(artifact, context, threads, kv_memory)


class Model:
    """A model that is ready to run.

    Any thread may use it: calls are served one after the other. A call that is interrupted leaves
    nothing wrong behind, and a process that was forked since the load must load its own.
    """

    def __init__(
        self, artifact: Artifact, context: int, threads: int | None, kv_memory: int | None = None
    ) -> None:
        self.manifest = artifact.manifest
        self._needed = memory_bytes(self.manifest, context, kv_memory)
        check_memory(self.manifest, context, self._needed)
        self.variant = artifact.variant.name
        self.context = context
        self.vocab_size = self.manifest.vocab_size
        path = artifact.tokenizer
        self.tokenizer = Tokenizer(path) if path is not None else None
        self._template = artifact.read_chat_template()
        self._reserved, self._stops = np.empty(0, np.int64), set(self.manifest.eos_token_ids)
        if self.tokenizer is not None:
            size = self.tokenizer.vocab_size
            self._reserved = reserved_ids(self.tokenizer.special, self.vocab_size, size)
            self._stops |= stop_ids(self.tokenizer)
        self.cached_tokens = 0  # of the last prompt: those that were not computed
        self._turn = 0  # counts the calls that used the cache
        self._certain = True  # whether the last of them ended as its caller was told
        threads = choose_threads(threads)
        self._driver = driver()
        counts = page_counts(self.manifest, context, kv_memory)
        self._driver.call(lambda: self._open(artifact, threads, counts))

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits after every token: ids [n] -> float32 [n, vocab]. Raises InputError."""
        ids = self._check_tokens(token_ids)
        return self._serve(lambda: self._score(ids))

    def generate(
        self, token_ids: Sequence[int], *, max_tokens: int | None = None, **options: object
    ) -> Iterator[GeneratedToken]:
        """Continue a prompt, one token at a time, until a stop id, a stop string or `max_tokens`.

        `options`: the fields of SamplingOptions (temperature, top_p, top_k, min_p, seed, logprobs,
        stop, stop_ids, logit_bias, frequency_penalty, presence_penalty); None: as if it were not
        given. The first four are otherwise the checkpoint's own, `manifest.sampling`. The stop id,
        or the token that completes a stop string, is the last one yielded. Without `max_tokens` the
        context is the limit. The KV cache is kept: a prompt that begins like the one before
        continues there. Another call ends this one: to go on with it then raises InputError. Raises
        InputError for bad arguments, before anything is computed.
        """
        ids = self._check_tokens(token_ids)
        sampling = self._check_options(options, Model.generate.__kwdefaults__ or ())
        return self._generate(ids, self._limit(ids, max_tokens), sampling, self._stops)

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        reasoning: str = "medium",
        current_date: str | None = "today",
        identity: str = IDENTITY,
        tools: Sequence[Mapping[str, object]] = (),
        builtin_tools: Sequence[str] = (),
        response_format: Mapping[str, object] | None = None,
        template: str = "harmony",
        max_tokens: int | None = None,
        **options: object,
    ) -> Iterator[Piece]:
        """Answer a conversation, in pieces as they are generated.

        `messages`: as in OpenAI's chat API, {"role": system, developer, user, assistant or tool,
        "content": text}, with tool_calls, tool_call_id, reasoning; also what `as_messages` makes of
        the pieces of an answer. `reasoning`: low, medium or high; `current_date`: YYYY-MM-DD, today
        or None; `identity`: who the model is told to be. `tools` (functions) and `response_format`
        have OpenAI's shapes; `builtin_tools`: of browser and python. No tool is run here.
        `template`: harmony, the format that the models were trained on, or checkpoint, to render
        the prompt with the chat template that the checkpoint came with (it needs jinja2).

        Every piece has a channel and a text, which is "" where there is none: Reasoning and Text,
        ToolCall and Arguments, and last Finish, with the reason and what it took. `max_tokens` and
        `options` as in `generate`, but `<|return|>`, `<|call|>` and `<|endoftext|>` end an answer,
        whatever ends other texts of the checkpoint, and `stop` is looked for in the text of channel
        final alone. Raises InputError, before anything is computed.
        """
        tokenizer = self._need_tokenizer("chat")
        if current_date == "today":
            current_date = datetime.date.today().isoformat()
        render: Callable[..., list[int]] = render_chat
        if template != "harmony":
            render = partial(render_template, self._need_template(template))
        prompt = render(
            messages,
            tokenizer,
            reasoning=reasoning,
            current_date=current_date,
            identity=identity,
            tools=tools,
            builtin_tools=builtin_tools,
            response_format=response_format,
        )
        ids = self._check_tokens(prompt)
        sampling = self._check_options(options, Model.chat.__kwdefaults__ or ())
        limit = self._limit(ids, max_tokens)
        tokens = self._generate(ids, limit, replace(sampling, stop=()), stop_ids(tokenizer))
        return generated_pieces(tokens, tokenizer, sampling, begun_answer(prompt, tokenizer))

    def prefill(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits [vocab] float32 after a prompt, for samplers of one's own; `decode` goes on.

        Raises InputError for ids that the context cannot hold.
        """
        ids = self._check_tokens(token_ids)
        return self._serve(lambda: self._host_logits(self._prefill, ids))

    def decode(self, token_id: int) -> np.ndarray:
        """Logits [vocab] float32 after one more token. Raises InputError at the context's end, and
        after a call that was interrupted."""
        (checked,) = self._check_tokens([token_id])
        if not self._certain:
            raise InputError(
                "decode: expected a call before this one that ended, found one that did not: it is "
                "uncertain what the token would follow; call `prefill` again"
            )
        if self._cache.length >= self.context:
            raise InputError(
                f"decode: expected room in the context of {self.context} positions, found none; "
                "call `forget`, or load with a larger context"
            )
        return self._serve(lambda: self._host_logits(self._decode, checked))

    def forget(self) -> None:
        """Empty the KV cache; generations that are under way end."""
        self._serve(self._forget)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; what looks like a special token stays text."""
        tokenizer = self._need_tokenizer("encode")
        if not isinstance(text, str):
            raise InputError(f"encode: expected text, found {text!r}")
        return tokenizer.encode(text)

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

    def _generate(
        self, ids: list[int], limit: int, options: SamplingOptions, stops: Set[int]
    ) -> Iterator[GeneratedToken]:
        sampler = Sampler(options, self._reserved)
        texts = TextStream(self.tokenizer, options.stop)
        stops = stops | options.stop_ids
        turn, cached, sample = self._serve(lambda: self._first_sample(sampler, ids))
        for count in range(1, limit + 1):
            ends = sample.token_id in stops
            text = texts.push(sample.token_id, is_last=ends or count == limit)
            reason = "stop" if ends or texts.stopped else "length" if count == limit else None
            usage = Usage(len(ids), cached, count)
            yield GeneratedToken(
                sample.token_id, sample.logprob, sample.top_logprobs, text, reason, usage
            )
            if reason is not None:
                return
            self._check_turn(turn)
            sample = self._serve(partial(self._next_sample, turn, sampler, sample.token_id))

    def _limit(self, ids: list[int], max_tokens: int | None) -> int:
        """How many tokens may follow a prompt."""
        limit = self.context - len(ids) + 1  # what is sampled last needs no position of its own
        return limit if max_tokens is None else min(limit, whole_number("max_tokens", max_tokens))

    def _check_turn(self, turn: int) -> None:
        if self._turn != turn:
            raise InputError(
                "generation: expected to be the last call that uses this model, found a later "
                "one, which took over the KV cache; finish one answer before the next, or "
                "load the model twice"
            )

    # From here to `_run`: on the device's thread.

    def _open(self, artifact: Artifact, threads: int, counts: PageCounts) -> None:
        needed = sum(self._needed.values()) - PROCESS_BYTES
        self._device = _open_device(artifact, threads, needed)
        self._cache = KVCache(self.manifest, self._device, counts)
        self._bound: list[Any] = []
        for array in (*self._cache.tables, *self._cache.arrays, *artifact.weights):
            self._driver.check()
            self._bound.append(self._device.tensor(array))
        self._chooser: Chooser | None = None  # where the logits are in the host's memory
        if not isinstance(self._device, Device):
            self._chooser = Chooser(self._device, self.vocab_size, self._reserved)

    def _score(self, ids: list[int]) -> np.ndarray:
        self._turn += 1
        self._cache.start_apart()
        rows = []
        for start in range(0, len(ids), self.manifest.score_chunk):
            part = ids[start : start + self.manifest.score_chunk]
            rows.append(self._device.numpy(self._run("score", part)).copy())
            self._cache.append(part)
        return np.concatenate(rows)

    def _host_logits(self, compute: Callable[[Any], Any], argument: object) -> np.ndarray:
        self._turn += 1
        logits: np.ndarray = self._device.numpy(compute(argument))
        return logits.reshape(-1)

    def _forget(self) -> None:
        self._turn += 1
        self._cache.clear()

    def _first_sample(self, sampler: Sampler, ids: list[int]) -> tuple[int, int, Sample]:
        """The turn that a generation has, how many tokens were cached, and the first one."""
        self._turn += 1
        sample = self._sample(sampler, self._prefill(ids))
        return self._turn, self.cached_tokens, sample

    def _next_sample(self, turn: int, sampler: Sampler, token_id: int) -> Sample:
        self._check_turn(turn)  # again: another thread's call may have come first
        return self._sample(sampler, self._decode(token_id))

    def _sample(self, sampler: Sampler, logits: Any) -> Sample:
        """The next token: chosen by the device where it can, so that its logits stay there."""
        options = sampler.device_options() if self._chooser is not None else None
        try:
            if self._chooser is None or options is None:
                return sampler.sample(self._device.numpy(logits).reshape(-1))
            token, logit = self._chooser.choose(logits, options)
            check_logit(logit, token)
        except ArtifactError:  # not a number: what the cache holds would spoil the next answer
            self._forget()
            raise
        return Sample(token)

    def _prefill(self, ids: list[int]) -> Any:
        """Extend the cache to `ids` -> the device's logits [1, vocab] after the last. At least one
        is computed."""
        kept = self.cached_tokens = self._cache.reuse(ids[:-1])
        logits = None
        for start in range(kept, len(ids), self.manifest.chunk):
            part = ids[start : start + self.manifest.chunk]
            if len(part) == 1:
                logits = self._decode(part[0])
                continue
            index = np.array([len(part) - 1], np.int32)
            logits = self._run("prefill", part, index)
            self._cache.append(part)
        self._cache.keep()
        return logits

    def _decode(self, token_id: int) -> Any:
        """Append one token -> the device's logits [1, vocab]."""
        logits = self._run("decode", [token_id])
        self._cache.append([token_id])
        return logits

    def _run(self, function: str, ids: Sequence[int], *more: np.ndarray) -> Any:
        self._driver.check()
        position = np.array([self._cache.begin(len(ids))], np.int32)
        return self._device.run(function, [np.array(ids, np.int32), position, *more], self._bound)

    def _check_tokens(self, token_ids: Sequence[int]) -> list[int]:
        return prompt_ids(token_ids, self.vocab_size, self.context, self.manifest.context)

    def _check_options(
        self, options: Mapping[str, object], others: Iterable[str]
    ) -> SamplingOptions:
        """`others`: names of further options that the caller has."""
        checked = sampling_options(options, others, self.vocab_size, self.manifest.sampling)
        if checked.stop:
            self._need_tokenizer("stop")
        return checked

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                f"{what}: expected an artifact with a tokenizer, found none in this one; compile "
                "a checkpoint that has tokenizer.json, or pass token ids to `generate`"
            )
        return self.tokenizer

    def _need_template(self, template: object) -> str:
        if template != "checkpoint":
            raise InputError(f"template: expected harmony or checkpoint, found {template!r:.100}")
        if self._template is None:
            raise InputError(
                "template: expected an artifact with the checkpoint's chat template, found none in "
                "this one; compile a checkpoint that has chat_template.jinja, or chat without it"
            )
        return self._template


def _open_device(
    artifact: Artifact, threads: int, needed_bytes: int
) -> Device | TensorDevice | LaunchDevice:
    manifest, library = artifact.manifest, artifact.library
    sha256 = manifest.files[library.name].sha256
    if manifest.on_cpu:
        return Device(library, threads, sha256)
    forbid_fork()
    launching = LAUNCH_DEVICES.get(manifest.runtime)
    if launching is not None:
        return launching(library, read_programs(artifact), sha256=sha256)
    return TensorDevice(library, manifest.device, threads, needed_bytes, sha256)
