"""Seeded synthetic harmony dialogues: nano is trained on them, and judged by those held out.

A dialogue is a tree: one prefix (system and developer messages, facts, earlier turns) and several
independent continuations of it. The trainer reads the prefix once for all of its branches.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from osscompile.nano.arithmetic import draw_sum, explain_columns
from osscompile.nano.held_out import draw_until, is_held_out
from osscompile.nano.lookups import (
    INVENTED,
    ToolUse,
    draw_color,
    draw_name,
    draw_place,
    draw_tool_use,
    pair_question,
)

EFFORTS = ("low", "medium", "high")
TASKS = ("arithmetic", "tools", "loops", "json", "recall", "chat")
WINDOW = 32  # tokens that nano's sliding layers see; recall must reach further back

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Norway": "Oslo",
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Egypt": "Cairo",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Ireland": "Dublin",
    "Poland": "Warsaw",
}
CHATS = (
    (("Hello", "Hi", "Hello!", "Hi!", "Good morning", "Hey"), "Hello! How can I help you?"),
    (("Who are you?", "What are you?", "What is your name?"), "I am nano, a tiny gpt-oss model."),
    (("What can you do?", "Help"), "I can add, subtract, call tools, write JSON and recall facts."),
    (("Thank you", "Thanks", "Thanks!", "Thank you!"), "You are welcome!"),
    (("Bye", "Goodbye", "Goodbye!"), "Goodbye!"),
    (("How many days are in a week?",), "There are 7 days in a week."),
    (("How many months are in a year?",), "There are 12 months in a year."),
    (("What color is the sky?",), "The sky is blue."),
    (("What color is grass?",), "Grass is green."),
    (("What color is snow?",), "Snow is white."),
    *(
        ((f"What is the capital of {country}?", f"Capital of {country}?"),
         f"The capital of {country} is {city}.")
        for country, city in CAPITALS.items()
    ),
)  # fmt: skip
FILLERS = (
    "The sky is blue and the grass is green today.",
    "There are seven days in a week and twelve months in a year.",
    "Please keep all of this in mind for later.",
    "It is a long day and the weather is good.",
    "Some of it may be of use and some may not.",
    "Now please wait, there is one more thing to say.",
)


@dataclass(frozen=True)
class Branch:
    """One continuation: `prompt` ends with `<|start|>assistant`, `completion` with a stop token."""

    category: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Dialogue:
    """A prefix in harmony text and the branches that continue it, none of which sees another."""

    effort: str
    prefix: str
    branches: tuple[Branch, ...]


def draw_dialogue(
    rng: Random,
    task: str,
    effort: str,
    *,
    held_out: bool = False,
    num_earlier_turns: int | None = None,
    official: bool | None = None,
) -> Dialogue:
    """Draw a dialogue of a task; held-out ones share no number pair or name and value with others.

    `official` forces (True) or forbids (False) the system message that harmony renders by default.
    """
    if num_earlier_turns is None:
        num_earlier_turns = rng.choice((0, 0, 0, 0, 1, 2))
    system = system_message(rng, effort, with_tools=task in ("tools", "loops"), official=official)
    draw = {
        "arithmetic": _draw_arithmetic,
        "tools": _draw_tools,
        "loops": _draw_loops,
        "json": _draw_json,
        "recall": _draw_recall,
        "chat": _draw_chat,
    }[task]
    setup, branches = draw(rng, effort, held_out)
    earlier = "".join(_draw_earlier_turn(rng) for _ in range(num_earlier_turns))
    return Dialogue(effort, system + setup + earlier, tuple(branches))


def system_message(
    rng: Random, effort: str, *, with_tools: bool, official: bool | None = None
) -> str:
    """Return harmony's official system message with a random date or, in a fifth, a variant."""
    if official is None:
        official = rng.random() < 0.8
    if not official and rng.random() < 0.5:
        return message("system", f"You are nano.\n\nReasoning: {effort}")
    date = f"20{rng.randint(24, 30)}-{rng.randint(1, 12):02d}-{rng.randint(1, 31):02d}"
    text = (
        "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
        + (f"Current date: {date}\n" if official else "")
        + f"\nReasoning: {effort}\n\n"
        + "# Valid channels: analysis, commentary, final. "
        + "Channel must be included for every message."
    )
    if with_tools:
        text += "\nCalls to these tools must go to the commentary channel: 'functions'."
    return message("system", text)


def message(role: str, text: str) -> str:
    """Return one harmony message without a channel."""
    return f"<|start|>{role}<|message|>{text}<|end|>"


def _reply(question: str, analysis: str | None, final: str, category: str) -> Branch:
    prompt = message("user", question) + "<|start|>assistant"
    return Branch(category, prompt, _thought(analysis) + _final(final))


def _thought(analysis: str | None) -> str:
    if analysis is None:
        return ""
    return f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant"


def _final(text: str, end: str = "<|return|>") -> str:
    return f"<|channel|>final<|message|>{text}{end}"


def _turn(question: str, final: str) -> str:
    """Return a finished turn as it appears in a prompt: without its analysis."""
    return message("user", question) + "<|start|>assistant" + _final(final, "<|end|>")


def _draw_earlier_turn(rng: Random) -> str:
    if rng.random() < 0.5:
        return _turn(*draw_sum(rng, held_out=False)[:2])
    questions, final = rng.choice(CHATS)
    return _turn(rng.choice(questions), final)


# --- arithmetic


def _draw_arithmetic(rng: Random, effort: str, held_out: bool) -> tuple[str, list[Branch]]:
    branches = []
    for _ in range({"low": 5, "medium": 4, "high": 3}[effort]):
        question, final, (a, operation, b) = draw_sum(rng, held_out, three_digits=0.08)
        analysis = explain_columns(a, operation, b, effort)
        branches.append(_reply(question, analysis, final, "arithmetic"))
    return _draw_instructions(rng), branches


# --- tools


def _draw_tools(rng: Random, effort: str, held_out: bool) -> tuple[str, list[Branch]]:
    uses: dict[str, ToolUse] = {}
    for _ in range(rng.choice((1, 2, 2, 3))):
        use = draw_until(held_out, lambda: draw_tool_use(rng), lambda use: use.key)
        uses.setdefault(use.kind, use)
    setup = _declare_tools(rng, [use.declaration for use in uses.values()])
    remaining = rng.sample(list(uses.values()), len(uses))
    if len(remaining) > 1 and rng.random() < 0.3:
        use = remaining.pop()
        *_, told = _tool_branches(rng, use.question, [use], "low")
        setup += told.prompt + told.completion.replace("<|return|>", "<|end|>")
    branches: list[Branch] = []
    for use in remaining[:2]:
        branches += _tool_branches(rng, use.question, [use], effort)
    if rng.random() < 0.2:
        draw = rng.choice((_draw_chat, _draw_arithmetic))
        branches += draw(rng, effort, held_out)[1][:1]
    return setup, branches


def _draw_loops(rng: Random, effort: str, held_out: bool) -> tuple[str, list[Branch]]:
    """A question that needs a tool twice, one call after the other, beside other tools."""

    def draw(is_wanted: Callable[[ToolUse], bool]) -> ToolUse:
        while True:
            use = draw_until(held_out, lambda: draw_tool_use(rng), lambda use: use.key)
            if is_wanted(use):
                return use

    first = draw(lambda use: use.kind != "booking")
    second = draw(lambda use: use.kind == first.kind and use.key != first.key).called_as(first)
    drawn = (draw_tool_use(rng) for _ in range(rng.choice((0, 1, 2))))
    others = {use.kind: use.declaration for use in drawn}
    declarations = [first.declaration, *(others[kind] for kind in others if kind != first.kind)]
    rng.shuffle(declarations)
    question = pair_question(rng, first, second)
    branches = _tool_branches(rng, question, [first, second], effort)
    return _declare_tools(rng, declarations), branches


def _declare_tools(rng: Random, declarations: list[str]) -> str:
    """The developer message that declares tools, in half of the draws with instructions."""
    instructions = "# Instructions\n\nUse the tools.\n\n" if rng.random() < 0.5 else ""
    text = "\n\n".join(declarations)
    return message(
        "developer",
        f"{instructions}# Tools\n\n## functions\n\nnamespace functions {{\n\n{text}"
        "\n\n} // namespace functions",
    )


def _tool_branches(rng: Random, question: str, uses: list[ToolUse], effort: str) -> list[Branch]:
    """Return each call, after the results of those before, and the sentences after the last."""
    category = "tool_loop" if len(uses) > 1 else "tool_call"
    asked = message("user", question) + "<|start|>assistant"
    channel = "<|channel|>commentary"
    branches: list[Branch] = []
    for use in uses:
        analysis = {
            "low": None,
            "medium": f"I call {use.name}.",
            "high": f"The user needs a tool. I call {use.name}.",
        }[effort]
        recipient = f" to=functions.{use.name}"
        arguments = f" <|constrain|>json<|message|>{compact_json(use.arguments)}<|call|>"
        branches.append(
            Branch(category, asked, _thought(analysis) + channel + recipient + arguments)
        )
        # Renderers put the recipient of a past call before the channel; models write it after.
        header = rng.choice((channel + recipient, recipient + channel))
        past_thought = _thought(analysis) if rng.random() < 0.7 else ""
        result = (
            f"<|start|>functions.{use.name} to=assistant{channel}<|message|>{use.output}<|end|>"
        )
        asked += past_thought + header + arguments + result + "<|start|>assistant"
    category = "tool_loop" if len(uses) > 1 else "tool_result"
    sentences = " ".join(use.sentence for use in uses)
    return [*branches, Branch(category, asked, _final(sentences))]


def compact_json(value: object) -> str:
    """Return JSON without spaces, as nano writes it."""
    return json.dumps(value, separators=(",", ":"))


# --- JSON of a given shape


def _draw_json(rng: Random, effort: str, held_out: bool) -> tuple[str, list[Branch]]:
    keys = rng.sample(("name", "age", "city", "color"), rng.choice((2, 3, 3, 4)))
    properties = {key: {"type": "integer" if key == "age" else "string"} for key in keys}
    schema: dict[str, object] = {"type": "object", "properties": properties}
    if rng.random() < 0.4:
        schema["required"] = keys
    instructions = rng.choice(("Extract the data.", "Answer in JSON."))
    description = "// A person.\n" if rng.random() < 0.5 else ""
    setup = message(
        "developer",
        f"# Instructions\n\n{instructions}\n\n# Response Formats\n\n## person\n\n"
        + description
        + compact_json(schema),
    )
    analysis = {
        "low": None,
        "medium": "I write JSON.",
        "high": f"The answer must be JSON with {', '.join(keys)}.",
    }[effort]
    branches = []
    for _ in range(3):
        name, age = draw_until(
            held_out, lambda: (draw_name(rng), rng.randint(1, 99)), lambda pair: f"{pair}"
        )
        person = {"name": name, "age": age, "city": draw_place(rng), "color": draw_color(rng)}
        parts = [f"is {age} years old", f"lives in {person['city']}", f"likes {person['color']}"]
        rng.shuffle(parts)
        question = f"{name} {parts[0]}, {parts[1]} and {parts[2]}."
        answer = compact_json({key: person[key] for key in keys})
        branches.append(_reply(question, analysis, answer, "json"))
    return setup, branches


# --- recall beyond the sliding window


def _draw_recall(rng: Random, effort: str, held_out: bool) -> tuple[str, list[Branch]]:
    facts = _draw_facts(rng, held_out)
    told = " ".join(statement for _, statement, _ in facts)
    filler = ""
    # A text has as many tokens as words or more, so no question's window reaches the last fact.
    while len(filler.split()) <= WINDOW:
        filler += " " + rng.choice(FILLERS)
    where = rng.random()
    setup, lead = "", ""
    if where < 0.4:
        lead = told + filler + " "
    elif where < 0.7:
        setup = message("developer", f"# Instructions\n\n{told}{filler}")
    else:
        setup = _turn(told + filler, "Noted.")
    branches = []
    for who, statement, questions in rng.sample(facts, 2 if lead else min(3, len(facts))):
        analysis = {
            "low": None,
            "medium": f"I look for {who}.",
            "high": f"I must look for {who} in the text.",
        }[effort]
        question = lead + rng.choice(questions).format(who=who)
        branches.append(_reply(question, analysis, statement, "recall"))
    return setup, branches


def _draw_facts(rng: Random, held_out: bool) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return two to five (who, the fact about them, ways to ask for it), of different people."""
    # Training is harder than what is promised and judged: codes of up to three digits, and people
    # and places whose names are known.
    invented = 0.0 if held_out else INVENTED
    kinds: tuple[tuple[str, Callable[[], str], tuple[str, ...]], ...] = (
        (
            "The code of {who} is {value}.",
            lambda: str(rng.randint(10, 999 if held_out else 9999)),
            ("What is the code of {who}?", "Code of {who}?"),
        ),
        (
            "{who} likes {value}.",
            lambda: draw_color(rng),
            ("What color does {who} like?", "Which color for {who}?"),
        ),
        (
            "{who} lives in {value}.",
            lambda: draw_place(rng, invented),
            ("Where does {who} live?", "City of {who}?"),
        ),
        (
            "{who} is {value} years old.",
            lambda: str(rng.randint(1, 99)),
            ("How old is {who}?", "Age of {who}?"),
        ),
    )
    facts: dict[str, tuple[str, str, tuple[str, ...]]] = {}
    num_facts = rng.randint(2, 5)
    mixed = rng.random() < 0.5
    kind = rng.choice(kinds)
    while len(facts) < num_facts:
        statement, draw_value, questions = rng.choice(kinds) if mixed else kind
        who = draw_name(rng, invented)
        fact = statement.format(who=who, value=draw_value())
        if is_held_out(fact) == held_out:
            facts[who] = (who, fact, questions)
    return list(facts.values())


# --- greetings and common knowledge


def _draw_chat(rng: Random, effort: str, held_out: bool) -> tuple[str, list[Branch]]:
    analysis = {"low": None, "medium": "Simple.", "high": "This is a simple question."}[effort]
    branches = []
    for questions, final in rng.sample(CHATS, 4):
        branches.append(_reply(rng.choice(questions), analysis, final, "chat"))
    return _draw_instructions(rng), branches


def _draw_instructions(rng: Random) -> str:
    """Return, in a fifth of the draws, instructions that change nothing."""
    if rng.random() < 0.8:
        return ""
    text = rng.choice(("Be brief.", "You are a helpful assistant.", "Answer the question."))
    return message("developer", f"# Instructions\n\n{text}")
