"""What callers ask of a model, checked before anything is computed: prompts, and how to answer."""

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from .arguments import prompt_ids, sampling_options, whole_number
from .artifact import Artifact
from .constrained import constrain_chat, constrain_text
from .constraint import Constraint
from .errors import InputError
from .generated import PieceMaker, TokenStream
from .grammar import Grammars
from .harmony import IDENTITY, begun_answer, render_chat, render_template, stop_ids
from .harmony.tool_choice import read_tool_choice
from .harmony.tools import check_apart, read_builtin_tools, read_tools
from .sampler import Sampler, reserved_ids
from .sampling_options import SamplingOptions
from .tokenizer import Tokenizer
from .tools.functions import Tool, definitions


@dataclass(frozen=True)
class Question:
    """A prompt of `ids` and how to answer it: with at most `limit` tokens, until one of `stops`.

    `begun`: for a chat, ids of the answer that the prompt has already. `constraint`: what the
    answer must be, which is told of one answer. `one_call`: it ends with its first call.
    """

    ids: list[int]
    options: SamplingOptions
    stops: frozenset[int]
    limit: int
    tokenizer: Tokenizer | None
    begun: Sequence[int] | None = None
    constraint: Constraint | None = None
    one_call: bool = False

    def token_stream(self) -> TokenStream:
        stop = self.options.stop if self.begun is None else ()  # a chat looks in its final text
        stops = self.stops | self.options.stop_ids
        return TokenStream(self.tokenizer, stop, stops, len(self.ids), self.limit)

    def piece_maker(self) -> PieceMaker:
        """For a chat."""
        assert self.tokenizer is not None and self.begun is not None
        return PieceMaker(self.tokenizer, self.options, self.begun, self.one_call)


class Questions:
    """What can be asked of an artifact that is loaded for `context` positions."""

    def __init__(self, artifact: Artifact, context: int) -> None:
        self._manifest, self._context = artifact.manifest, context
        self.tokenizer = artifact.read_tokenizer()
        self._template = artifact.read_chat_template()
        self.reserved = np.empty(0, np.int64)  # ids that are never chosen
        self._stops = frozenset(self._manifest.eos_token_ids)
        if self.tokenizer is not None:
            size = self.tokenizer.vocab_size
            self.reserved = reserved_ids(self.tokenizer.special, self._manifest.vocab_size, size)
            self._stops |= stop_ids(self.tokenizer)
            ends = self._stops - {self.tokenizer.special["<|call|>"]}  # it ends calls alone
            self._grammars = Grammars(self.tokenizer, self._manifest.vocab_size, ends)

    def sampler(self, question: Question) -> Sampler:
        return Sampler(question.options, self.reserved, question.constraint)

    def of_ids(
        self,
        token_ids: Sequence[int],
        *,
        response_format: Mapping[str, object] | None = None,
        max_tokens: int | None = None,
        **options: object,
    ) -> Question:
        """Continue a prompt: see `Model.generate`. Raises InputError."""
        ids = self.check_ids(token_ids)
        sampling = self._sampling(options, Questions.of_ids.__kwdefaults__ or ())
        limit, constraint = self._limit(ids, max_tokens), None
        if response_format is not None:
            self.need_tokenizer("response_format")
            constraint = constrain_text(self._grammars, response_format, sampling)
        return Question(ids, sampling, self._stops, limit, self.tokenizer, None, constraint)

    def of_messages(
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
    ) -> Question:
        """Answer a conversation: see `Model.chat`. Raises InputError."""
        tokenizer = self.need_tokenizer("chat")
        current_date = _date(current_date)
        described = definitions(tools)
        functions, builtins = read_tools(described), read_builtin_tools(builtin_tools)
        check_apart(functions, builtins)
        choice = read_tool_choice(tool_choice, functions, builtins)
        if not isinstance(parallel_tool_calls, bool):
            raise InputError(
                f"parallel_tool_calls: expected True or False, found {parallel_tool_calls!r:.100}"
            )
        render: Callable[..., list[int]] = render_chat
        if template != "harmony":
            render = partial(render_template, self._need_template(template))
        prompt = render(
            messages,
            tokenizer,
            reasoning=reasoning,
            current_date=current_date,
            identity=identity,
            tools=described,
            builtin_tools=builtin_tools,
            response_format=response_format,
        )
        ids = self.check_ids(prompt)
        sampling = self._sampling(options, Questions.of_messages.__kwdefaults__ or ())
        limit = self._limit(ids, max_tokens)
        begun = begun_answer(prompt, tokenizer)
        constraint = constrain_chat(
            self._grammars,
            tokenizer,
            response_format,
            described,
            functions,
            builtins,
            choice,
            sampling,
            begun,
        )
        stops, one_call = stop_ids(tokenizer), not parallel_tool_calls
        return Question(ids, sampling, stops, limit, tokenizer, begun, constraint, one_call)

    def check_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Raises InputError for ids that are none, and for more than the context holds."""
        facts = self._manifest
        return prompt_ids(token_ids, facts.vocab_size, self._context, facts.context)

    def need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                f"{what}: expected an artifact with a tokenizer, found none in this one; compile "
                "a checkpoint that has tokenizer.json, or pass token ids to `generate`"
            )
        return self.tokenizer

    def _limit(self, ids: list[int], max_tokens: int | None) -> int:
        """How many tokens may follow a prompt."""
        limit = self._context - len(ids) + 1  # what is sampled last needs no position of its own
        return limit if max_tokens is None else min(limit, whole_number("max_tokens", max_tokens))

    def _sampling(self, options: Mapping[str, object], others: Iterable[str]) -> SamplingOptions:
        """`others`: names of further options that the caller has."""
        facts = self._manifest
        checked = sampling_options(options, others, facts.vocab_size, facts.sampling)
        if checked.stop:
            self.need_tokenizer("stop")
        return checked

    def _need_template(self, template: object) -> str:
        if template != "checkpoint":
            raise InputError(f"template: expected harmony or checkpoint, found {template!r:.100}")
        if self._template is None:
            raise InputError(
                "template: expected an artifact with the checkpoint's chat template, found none in "
                "this one; compile a checkpoint that has chat_template.jinja, or chat without it"
            )
        return self._template


def _date(given: object) -> str | None:
    """YYYY-MM-DD; None: no date is told. Raises InputError."""
    if given is None:
        return None
    try:
        if given == "today":
            return datetime.date.today().isoformat()
        if isinstance(given, str) and datetime.date.fromisoformat(given).isoformat() == given:
            return given
    except ValueError:
        pass
    raise InputError(f"current_date: expected YYYY-MM-DD, today or None, found {given!r:.100}")
