"""Which rows each step computes: of many answers at once, until all have ended.

Answers join and leave between any two steps. A step takes the next token of every answer that is
being told, and beside them some of a prompt, so that a long one does not stop the others for
longer than a step of `ROWS_BESIDE` rows takes. When pages run out, the youngest answer waits and is
computed again when another has ended.
"""

from collections import deque
from collections.abc import Callable, Iterable

from .errors import ArtifactError, OsscompileError
from .generated import GeneratedToken
from .kv_cache import CachedSequence
from .pages import NoPages
from .questions import Question
from .runner import Rows, Runner
from .sampler import Sampler

ROWS_BESIDE = 64  # of prompts in a step that also tells the next tokens of others


class Answer:
    """What is said to a question, while it is computed.

    `tell` is called with each token that is said, and returns true to end the answer there; `end`
    is called once it has ended, with the error that ended it, or None. `cancelled` may be set at
    any time by anybody.
    """

    def __init__(
        self,
        question: Question,
        sampler: Sampler,
        tell: Callable[[GeneratedToken], object],
        end: Callable[[BaseException | None], object] = lambda error: None,
    ) -> None:
        self.tokens = list(question.ids)  # and then also those said
        self.sampler, self.stream = sampler, question.token_stream()
        self.tell, self.end = tell, end
        self.cancelled = False
        self.error: BaseException | None = None
        self.sequence: CachedSequence | None = None  # while it runs

    def missing(self) -> int:
        """Tokens that are not computed yet."""
        assert self.sequence is not None
        return len(self.tokens) - self.sequence.length


class Scheduler:
    """Steps of a runner for many answers. It is used on the driver's thread, but for `add`."""

    def __init__(self, runner: Runner, chunk: int, most: int) -> None:
        self._runner, self._chunk, self._most = runner, chunk, most
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []  # the oldest first
        self._full = False  # an answer waits for pages until another has ended

    def add(self, answer: Answer) -> None:
        """It waits from now on; any thread may add one."""
        self._waiting.append(answer)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def run(self, answers: Iterable[Answer]) -> None:
        """Compute answers until all have ended. Raises the error of the first that one ended."""
        asked = list(answers)
        self._waiting.extend(asked)
        try:
            while self.has_work:
                self.step()
        finally:  # an interrupted caller wants none of them
            self.end_all(None)
        for answer in asked:
            if answer.error is not None:
                raise answer.error

    def step(self) -> None:
        """Compute some rows; answers that ended leave their pages at once."""
        for answer in [a for a in (*self._running, *self._waiting) if a.cancelled]:
            self._leave(answer, None)
        self._admit()
        rows = self._rows()
        if not rows:
            return
        try:
            logits = self._runner.step([row for _, row in rows])
            told = [answer for answer, row in rows if row.wanted]
            samples = self._runner.sample(logits, [a.sampler for a in told]) if told else []
        except OsscompileError as error:
            # a device that does not work: what the cache holds may be wrong
            self.end_all(error)
            self._runner.cache.clear()
            return
        for answer, sample in zip(told, samples, strict=True):
            assert answer.sequence is not None
            if isinstance(sample, ArtifactError):  # no numbers: what it wrote would spoil others
                self._runner.cache.drop(answer.sequence)
                self._leave(answer, sample)
                continue
            if answer.stream.count == 0:  # a turn begins here
                answer.sequence.keep()
            if answer.sampler.error is not None:
                self._leave(answer, answer.sampler.error)
                continue
            token = answer.stream.push(sample)
            answer.tokens.append(token.token_id)
            has_ended = answer.tell(token)
            if has_ended or token.finish_reason is not None:
                self._leave(answer, None)

    def end_all(self, error: BaseException | None) -> None:
        """End every answer."""
        for answer in (*self._running, *self._waiting):
            self._leave(answer, error)

    def _admit(self) -> None:
        """Let answers run that wait, in their order, while there is room."""
        while self._waiting and len(self._running) < self._most:
            if self._full and self._running:
                return
            answer, sequence = self._waiting[0], self._runner.cache.start()
            try:
                cached = sequence.reuse(answer.tokens[:-1])
            except NoPages:
                self._runner.cache.leave(sequence)
                self._full = True
                return
            self._full = False
            answer.stream.begin(cached)
            answer.sequence = sequence
            self._running.append(answer)
            self._waiting.popleft()

    def _rows(self) -> list[tuple[Answer, Rows]]:
        """What the next step computes; there are pages for it."""
        running = list(self._running)
        rows: list[tuple[Answer, Rows]] = []
        for answer, count in zip(running, self._share([a.missing() for a in running]), strict=True):
            if answer.sequence is None:  # it has to wait
                continue
            missing = answer.missing()
            if count == 0 or not self._make_room(answer, count):
                continue
            ids = answer.tokens[-missing:][:count]
            rows.append((answer, Rows(answer.sequence, ids, int(count == missing))))
        return rows

    def _share(self, missing: list[int]) -> list[int]:
        """How many rows each answer gets, the oldest first, of those that it misses.

        One that is told gets its next token. Of what is left for prompts half is the oldest's, and
        the shortest gets the rest, so that neither waits for the other; between equals the older
        one comes first.
        """
        telling = missing.count(1)
        left = min(self._chunk, telling + ROWS_BESIDE) if telling else self._chunk
        left -= telling
        rows = [int(count == 1) for count in missing]
        prompts = [i for i, count in enumerate(missing) if count > 1]
        for oldest in prompts[:1]:
            rows[oldest] = min(missing[oldest], (left + 1) // 2)
            left -= rows[oldest]
        for i in sorted(prompts, key=missing.__getitem__):
            more = min(missing[i] - rows[i], left)
            rows[i] += more
            left -= more
        return rows

    def _make_room(self, answer: Answer, count: int) -> bool:
        """Take pages for more tokens of an answer; of younger ones if need be, or it has to wait
        itself."""
        assert answer.sequence is not None
        while True:
            try:
                answer.sequence.begin(count)
                return True
            except NoPages:
                youngest = self._running[-1]
                self._wait(youngest)
                if youngest is answer:
                    return False

    def _wait(self, answer: Answer) -> None:
        """It gives its pages away, and is computed again later."""
        self._stop_running(answer)
        self._waiting.appendleft(answer)
        self._full = True

    def _leave(self, answer: Answer, error: BaseException | None) -> None:
        if answer.sequence is None:
            self._waiting.remove(answer)
        else:
            self._stop_running(answer)
            self._full = False
        answer.error = error
        answer.end(error)

    def _stop_running(self, answer: Answer) -> None:
        assert answer.sequence is not None
        self._running.remove(answer)
        answer.sequence.keep()
        self._runner.cache.leave(answer.sequence)
        answer.sequence = None
