"""The options of a request -> what its answer must be: a constraint, or none."""

from collections.abc import Mapping, Sequence

from .constraint import Constraint
from .errors import InputError
from .grammar import Grammars, grammar_of
from .harmony.answer_grammar import ANY_TEXT, answer_grammars
from .harmony.structured import ResponseFormat, read_response_format, strict_parameters
from .harmony.tool_choice import (
    ToolChoice,
    builtin_recipients,
    function_recipient,
    tool_constraint,
)
from .harmony.typescript import Function, Namespace
from .sampling_options import SamplingOptions
from .tokenizer import Tokenizer


def constrain_text(
    grammars: Grammars, response_format: object, options: SamplingOptions
) -> Constraint | None:
    """All that is generated obeys the format. Raises InputError."""
    asked = read_response_format(response_format)
    if asked is None:
        return None
    _refuse_stops(options, "response_format", ("stop", "stop_ids"))
    return grammars.constraint("response_format", [grammar_of("response_format", asked)])


def constrain_chat(
    grammars: Grammars,
    tokenizer: Tokenizer,
    response_format: object,
    tools: Sequence[Mapping[str, object]] | None,
    functions: Sequence[Function],
    builtin_tools: Sequence[Namespace],
    choice: ToolChoice | None,
    options: SamplingOptions,
    begun: Sequence[int],
) -> Constraint | None:
    """The text on channel final obeys the format, the arguments of strict functions obey their
    parameters, and the answer a choice of tools. `functions`: what was read of the `tools`;
    `begun`: ids of the answer that the prompt has. Raises InputError."""
    asked = read_response_format(response_format)
    strict = strict_parameters(tools, functions)
    if asked is None and not strict:
        if choice is None:
            return None
        return tool_constraint(choice, tokenizer, grammars.vocab_size, begun)
    answer, calls = ANY_TEXT, {function_recipient(f.name): ANY_TEXT for f in functions}
    if asked is not None:
        _refuse_stops(options, "response_format", ("stop", "stop_ids"))
        answer = grammar_of("response_format", asked)
        grammars.check("response_format", answer)
    for name, parameters in strict.items():
        _refuse_stops(options, "strict arguments", ("stop_ids",))
        where = f"tools: parameters of {name}"
        call = calls[function_recipient(name)] = grammar_of(
            where, ResponseFormat("json", parameters)
        )
        grammars.check(where, call)
    for tool in builtin_tools:
        calls |= dict.fromkeys(builtin_recipients(tool), ANY_TEXT)
    if choice is not None:
        calls = {recipient: call for recipient, call in calls.items() if recipient in choice.calls}
    answers = choice is None or choice.answers
    parts = answer_grammars(tokenizer.special, answer if answers else None, calls)
    return grammars.constraint("response_format and tools", parts, begun)


def _refuse_stops(options: SamplingOptions, what: str, names: Sequence[str]) -> None:
    """They would end an answer before it is what it must be."""
    found = next((name for name in names if getattr(options, name)), None)
    if found is not None:
        raise InputError(f"{found}: expected none beside {what}, found some; leave it out")
