"""The grammar of a whole answer, where its text or the arguments of its calls have grammars."""

import json
from collections.abc import Mapping, Sequence

from .header import FUNCTIONS

Grammar = dict[str, object]  # one of llguidance's: {"lark_grammar": ...} or {"json_schema": ...}
ANY_TEXT: Grammar = {"lark_grammar": "start: /(?s:.*)/"}


def answer_grammars(
    special: Mapping[str, int], answer: Grammar | None, calls: Mapping[str, Grammar]
) -> Sequence[Grammar]:
    """The grammar of what follows `<|start|>assistant`, and those that it refers to.

    answer: of the text on channel final, None for an answer that only calls; calls: of the
    arguments, by recipient. A message of analysis may come first, and before a call or an answer
    beside calls one of commentary; both are any text. Then comes the answer or a call: without one
    of them the grammar accepts no end. What the model was not trained to write has no place: text
    without a header, a second answer, special tokens within a text. `<|end|>` may end the answer as
    `<|return|>` does.
    """
    sign = {name: f"<[{id}]>" for name, id in special.items()}
    channel, message, constrain = sign["<|channel|>"], sign["<|message|>"], sign["<|constrain|>"]
    before, last = "(analysis next)?", list[str]()
    rules = [
        f'next: {sign["<|end|>"]} {sign["<|start|>"]} "assistant"',
        f'analysis: {channel} "analysis" {message} TEXT',
        f'preamble: {channel} "commentary" {message} TEXT',
        f'type: " "? {constrain} ("json" | "code") | " json" | " code"',
        "TEXT: /(?s:.*)/",
    ]
    named = {f"call_{i}": call for i, call in enumerate(calls.values())}
    if answer is not None:
        rules.append(f'final: {channel} "final" type? {message} @answer {sign["<|end|>"]}?')
        last.append("final")
        named["answer"] = answer
    for i, recipient in enumerate(calls):
        to = json.dumps(f" to={recipient}", ensure_ascii=False)
        channels = '"commentary"' if recipient.startswith(FUNCTIONS) else "builtin"
        header = f"{channel} {channels} {to} type? | {to} {channel} {channels} type?"
        rules.append(f"call_{i}: ({header}) {message} @call_{i} {sign['<|call|>']}")
        last.append(f"call_{i}")
    if calls:
        before += " (preamble next)?"
        rules.append('builtin: "analysis" | "commentary"')
    whole = "\n".join([f"start: {before} ({' | '.join(last)})", *rules])
    return [{"lark_grammar": whole}, *({"name": name, **part} for name, part in named.items())]
