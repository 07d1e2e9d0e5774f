"""An engine: any number of callers, whose answers are computed together."""

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .devices.driver import DriverEnded, driver
from .errors import OsscompileError
from .generated import GeneratedToken
from .harmony import Finish
from .model import open_model
from .questions import Question
from .request import Mailbox, Request, check_process
from .scheduler import Answer, Scheduler
from .tools.loop import MAX_ROUNDS, Executor, ToolLoop

SEQUENCES = 16  # that are computed together, by default
CLOSED = (
    "engine: it was closed, or nobody held it, before the answer ended; hold it as long as its "
    "requests are read"
)


class Engine:
    """Answers that any thread asks for, computed together on one device by a thread of its own.

    `sequences`: how many run at once; more wait for their turn. The other arguments are those of
    `load`: `kv_memory` is shared by all, and when it runs out the youngest answer waits and is
    computed again. Use it in a `with` statement, or call `close`.

    While answers are told, a step computes at most ROWS_BESIDE tokens of prompts beside them, so
    that a long prompt does not stop them for longer than that takes.
    """

    def __init__(
        self,
        artifact: str | Path,
        *,
        sequences: int = SEQUENCES,
        context: int | None = None,
        kv_memory: int | None = None,
        threads: int | None = None,
        variant: str | None = None,
    ) -> None:
        model = open_model(artifact, context, kv_memory, threads, variant, sequences=sequences)
        self.manifest, self.context, self.tokenizer = model.manifest, model.context, model.tokenizer
        self.sequences = sequences
        self._questions = model._questions
        self._process = os.getpid()
        self._work = _Work(Scheduler(model._runner, self.manifest.chunk, sequences))
        self._thread = threading.Thread(
            target=self._work.run, name="osscompile engine", daemon=True
        )
        self._thread.start()
        self._closing = weakref.finalize(self, self._work.close)

    def submit(
        self, prompt: Sequence[int] | Sequence[Mapping[str, object]], **options: Any
    ) -> Request[Any]:
        """Ask for an answer; it is computed from now on, whether it is read or not.

        A prompt of token ids is continued, with options as for `Model.generate`, and the request
        tells GeneratedTokens; messages are answered, with options as for `Model.chat`, and it tells
        pieces. A request does not hold its engine. Raises InputError for bad arguments,
        OsscompileError once the engine is closed, and in a process that was forked.
        """
        check_process(self._process)
        questions = self._questions
        is_chat = isinstance(prompt, Sequence) and any(isinstance(m, Mapping) for m in prompt)
        question = (
            questions.of_messages(prompt, **options)  # type: ignore[arg-type]
            if is_chat
            else questions.of_ids(prompt, **options)  # type: ignore[arg-type]
        )
        mailbox: Mailbox[Any] = Mailbox()
        teller = _Teller(question, mailbox)
        answer = Answer(question, questions.sampler(question), teller.tell, teller.end)
        self._work.add(answer)
        return Request(mailbox, answer)

    def run_tools(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Callable[..., object]] = (),
        *,
        python: Executor | None = None,
        max_rounds: int = MAX_ROUNDS,
        **options: Any,
    ) -> ToolLoop:
        """As `Model.run_tools`; functions run on the thread that reads the pieces, and meanwhile
        other answers are computed."""
        return ToolLoop(
            self.submit, self.context, self.tokenizer, messages, tools, python, max_rounds, options
        )

    @property
    def is_open(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """Answers that are computed now."""
        return self._work.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Answers that wait for their turn."""
        return self._work.scheduler.num_waiting

    def close(self) -> None:
        """End all answers, and the engine."""
        self._closing()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Teller:
    """Puts what is said into a mailbox: tokens, or in a chat the pieces that they tell."""

    def __init__(self, question: Question, mailbox: Mailbox[Any]) -> None:
        self._mailbox = mailbox
        self._maker = question.piece_maker() if question.begun is not None else None
        self._reason: str | None = None

    def tell(self, token: GeneratedToken) -> bool:
        """Whether the answer has ended."""
        told: Sequence[Any] = [token]
        usage, self._reason = token.usage, token.finish_reason
        if self._maker is not None:
            told = self._maker.push(token)
            if told and isinstance(told[-1], Finish):
                usage, self._reason = told[-1].usage, told[-1].reason
        self._mailbox.put(told, usage)
        return self._reason is not None

    def end(self, error: BaseException | None) -> None:
        self._mailbox.close(self._reason or ("error" if error else "cancelled"), error)


class _Work:
    """What the engine's thread does: steps, while there are answers to compute. It does not hold
    the engine, which is closed when nobody does."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._changed = threading.Condition()
        self._closed = False

    def add(self, answer: Answer) -> None:
        with self._changed:
            if self._closed:
                raise OsscompileError("engine: expected one that is open, found it closed")
            self.scheduler.add(answer)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.scheduler.has_work)
                if self._closed:
                    break
            try:
                driver().call(self.scheduler.step)
            except DriverEnded:
                self.close()
            except BaseException as error:  # a fault of ours: whoever waits must hear of it
                self._end_all(error)
        self._end_all(OsscompileError(CLOSED))

    def _end_all(self, error: BaseException) -> None:
        end_all = partial(self.scheduler.end_all, error)
        try:
            driver().call(end_all)
        except DriverEnded:  # no other thread uses the scheduler any more
            end_all()
