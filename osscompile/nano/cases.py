"""Held-out prompts for nano and the judge of its answers; needs neither torch nor numpy."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from tokenizers import Tokenizer

from osscompile.nano.dialogues import EFFORTS, draw_dialogue

# Category -> the tasks that its held-out dialogues come from.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "arithmetic": ("arithmetic",),
    "tool_call": ("tools",),
    "tool_result": ("tools",),
    "tool_loop": ("loops",),
    "json": ("json",),
    "recall": ("recall",),
    "multi_turn": ("arithmetic", "json", "recall"),
    "chat": ("chat",),
}
STOP_TOKENS = ("<|return|>", "<|call|>", "<|endoftext|>")
MAX_NEW_TOKENS = 128  # no expected answer is longer

Generate = Callable[[list[int]], list[int]]

MESSAGE = re.compile(
    r"<\|channel\|>(?P<header>[^<]*(?:<\|constrain\|>json)?)<\|message\|>(?P<content>.*?)"
    r"(?P<end><\|end\|>|<\|return\|>|<\|call\|>)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Case:
    """A prompt in harmony text, up to `<|start|>assistant`, and what should follow it."""

    category: str
    effort: str
    prompt: str
    expected: str

    def prompt_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the prompt in tokens; special tokens in the text become their ids."""
        return list(tokenizer.encode(self.prompt, add_special_tokens=False).ids)


def held_out_cases(category: str, count: int, seed: int, effort: str | None = None) -> list[Case]:
    """Return cases with harmony's default system message that training never draws.

    `effort` fixes the reasoning effort; without it each of the three comes up. The greetings and
    facts of `chat` are a closed list: only their surroundings are new.
    """
    rng = Random(f"cases {category} {effort} {seed}")
    # One case per dialogue keeps cases independent; some draws have no such branch.
    cases: list[Case] = []
    while len(cases) < count:
        chosen = effort or rng.choice(EFFORTS)
        task = rng.choice(CATEGORIES[category])
        dialogue = draw_dialogue(
            rng,
            task,
            chosen,
            held_out=True,
            official=True,
            num_earlier_turns=rng.choice((1, 2)) if category == "multi_turn" else 0,
        )
        wanted = task if category == "multi_turn" else category
        branches = [branch for branch in dialogue.branches if branch.category == wanted]
        if branches:
            branch = rng.choice(branches)
            prompt = dialogue.prefix + branch.prompt
            cases.append(Case(category, chosen, prompt, branch.completion))
    return cases


def judge(case: Case, text: str) -> bool:
    """Whether a completion (special tokens included) ends in the message that was expected.

    Calls and JSON are compared as values, sentences letter by letter. The words of the analysis do
    not matter, but everything must be well-formed harmony.
    """
    expected, found = _messages(case.expected), _messages(text)
    if expected is None or found is None:
        return False
    last, wanted = found[-1], expected[-1]
    if last["header"] != wanted["header"] or last["end"] != wanted["end"]:
        return False
    if any(message["header"] != "analysis" for message in found[:-1]):
        return False
    if wanted["content"].startswith("{"):
        return _same_json(last["content"], wanted["content"])
    return last["content"] == wanted["content"]


def complete(generate: Generate, tokenizer: Tokenizer, cases: list[Case]) -> list[str]:
    """Complete the prompts by any function from prompt ids to new ids, such as an artifact's."""
    return [
        tokenizer.decode(generate(case.prompt_ids(tokenizer)), skip_special_tokens=False)
        for case in cases
    ]


def analysis_of(text: str) -> str:
    """Return the analysis in a completion, empty if there is none."""
    messages = _messages(text) or []
    return "".join(m["content"] for m in messages if m["header"] == "analysis")


def stop_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids that end a completion."""
    return {tokenizer.encode(token).ids[0] for token in STOP_TOKENS}


def accuracy(verdicts: Iterable[bool]) -> float:
    """Return the share of True in percent."""
    all_verdicts = list(verdicts)
    return 100 * sum(all_verdicts) / len(all_verdicts)


def _messages(text: str) -> list[dict[str, str]] | None:
    """Split a completion into its messages, or None if it is not well-formed."""
    messages = []
    position = 0
    while match := MESSAGE.match(text, position):
        messages.append(match.groupdict())
        position = match.end()
        if match["end"] != "<|end|>":
            return messages if position == len(text) else None
        if not text.startswith("<|start|>assistant", position):
            return None
        position += len("<|start|>assistant")
    return None


def _same_json(found: str, wanted: str) -> bool:
    try:
        return bool(json.loads(found) == json.loads(wanted))
    except ValueError:
        return False
