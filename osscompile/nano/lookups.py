"""Names, places and tools that occur in nano's dialogues."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

NAMES = (
    "Anna Ben Carl Dora Emma Finn Gina Hugo Iris Jack Kate Leo Mia Nina Omar Paul Rosa Sam Tina "
    "Vera Adam Bella Clara David Eva Felix Grace Henry Ivan Julia Karl Laura Max Nora Oscar Peter "
    "Ruth Sara Tom Victor Alice Bob Lena Mark Oliver Sofia Simon Maria"
).split()
PLACES = (
    "Paris London Rome Berlin Madrid Oslo Tokyo Lima Cairo Delhi Vienna Prague Athens Dublin "
    "Lisbon Warsaw Boston Denver Miami Sydney Seoul Nairobi Toronto Chicago Zurich Munich Milan "
    "Geneva Dallas Austin Moscow Helsinki Stockholm Amsterdam Brussels Budapest"
).split()
COLORS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple")
SKIES = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear", "stormy")
ONSETS = "b c d f g h k l m n p r s t v z br kr st tr".split()
VOWELS = "aeiou"
INVENTED = 0.15  # share of names and places that are made up, so that copying must be learned


def draw_name(rng: Random, invented: float = INVENTED) -> str:
    """Draw a first name, or an invented one."""
    return _invent(rng) if rng.random() < invented else rng.choice(NAMES)


def draw_place(rng: Random, invented: float = INVENTED) -> str:
    """Draw a city, or an invented one."""
    return _invent(rng) if rng.random() < invented else rng.choice(PLACES)


def draw_color(rng: Random) -> str:
    """Draw one of a few colours."""
    return rng.choice(COLORS)


def _invent(rng: Random) -> str:
    syllables = (rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 2, 3))))
    return "".join(syllables).capitalize()


@dataclass(frozen=True)
class ToolUse:
    """A tool as the developer message declares it, a question that needs it, and what follows."""

    kind: str
    name: str
    declaration: str
    question: str
    arguments: Mapping[str, object]
    output: str
    sentence: str

    @property
    def key(self) -> str:
        """The key that tells this use from those trained on."""
        return f"{self.kind} {list(self.arguments.values())}"

    def called_as(self, other: "ToolUse") -> "ToolUse":
        """The same use of the tool as another of its kind declares it."""
        arguments = dict(zip(other.arguments, self.arguments.values(), strict=True))
        return replace(self, name=other.name, declaration=other.declaration, arguments=arguments)


# Questions that need a tool twice: the kind's own first, then that of whatever a person has.
PAIRS = {
    "weather": ("What is the weather in {} and in {}?", "How is the weather in {} and in {}?"),
    "time": ("What time is it in {} and in {}?", "Tell me the time in {} and in {}."),
    "multiply": ("What is {} times {} and {} times {}?", "Multiply {} and {}, then {} and {}."),
}
PAIRS_OF_PEOPLE = ("What is the {kind} of {} and of {}?", "Find the {kind} of {} and of {}.")


def pair_question(rng: Random, first: ToolUse, second: ToolUse) -> str:
    """A question that needs both uses of one tool, in this order."""
    forms = PAIRS.get(first.kind, PAIRS_OF_PEOPLE)
    values = (*first.arguments.values(), *second.arguments.values())
    return rng.choice(forms).format(*values, kind=first.kind)


def draw_tool_use(rng: Random) -> ToolUse:
    """Draw one of five kinds of tool; names of functions and parameters vary within a kind."""
    draws = (_weather, _weather, _time, _lookup, _multiply, _booking)
    return rng.choice(draws)(rng)


def _declare(name: str, description: str, parameters: list[str]) -> str:
    lines = "\n".join(parameters)
    return f"// {description}\ntype {name} = (_: {{\n{lines}\n}}) => any;"


def _output(rng: Random, value: Mapping[str, object]) -> str:
    return json.dumps(value, separators=rng.choice(((",", ":"), (", ", ": "))))


def _place_parameter(rng: Random) -> tuple[str, list[str]]:
    key = rng.choice(("city", "city", "location", "place"))
    comment = ["// The name of the city."] if rng.random() < 0.3 else []
    return key, [*comment, f"{key}: string,"]


def _weather(rng: Random) -> ToolUse:
    name = rng.choice(("get_weather", "get_weather", "get_current_weather", "weather"))
    key, parameters = _place_parameter(rng)
    if rng.random() < 0.3:
        parameters.append('format?: "celsius" | "fahrenheit", // default: celsius')
    description = rng.choice(("Gets the weather.", "Gets the current weather."))
    place, degrees, sky = draw_place(rng), rng.randint(-9, 39), rng.choice(SKIES)
    question = rng.choice(
        (
            "What is the weather in {place}?",
            "How is the weather in {place}?",
            "What is the weather like in {place}?",
            "Weather in {place}?",
        )
    ).format(place=place)
    return ToolUse(
        kind="weather",
        name=name,
        declaration=_declare(name, description, parameters),
        question=question,
        arguments={key: place},
        output=_output(rng, {rng.choice(("temperature", "temp")): degrees, "sky": sky}),
        sentence=f"It is {degrees} degrees and {sky} in {place}.",
    )


def _time(rng: Random) -> ToolUse:
    name = rng.choice(("get_time", "get_current_time"))
    key, parameters = _place_parameter(rng)
    place, time = draw_place(rng), f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    question = rng.choice(
        ("What time is it in {place}?", "Time in {place}?", "Tell me the time in {place}.")
    ).format(place=place)
    return ToolUse(
        kind="time",
        name=name,
        declaration=_declare(name, "Gets the time.", parameters),
        question=question,
        arguments={key: place},
        output=_output(rng, {"time": time}),
        sentence=f"It is {time} in {place}.",
    )


def _lookup(rng: Random) -> ToolUse:
    what = rng.choice(("phone", "age", "code", "salary", "team"))
    name, key = rng.choice((f"get_{what}", f"find_{what}")), rng.choice(("name", "person", "user"))
    who, value = draw_name(rng), rng.randint(10, 9999)
    question = rng.choice(("What is the {what} of {who}?", "Find the {what} of {who}."))
    return ToolUse(
        kind=what,
        name=name,
        declaration=_declare(name, f"Finds the {what} of a person.", [f"{key}: string,"]),
        question=question.format(what=what, who=who),
        arguments={key: who},
        output=_output(rng, {what: value}),
        sentence=f"The {what} of {who} is {value}.",
    )


def _multiply(rng: Random) -> ToolUse:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    question = rng.choice(("What is {a} times {b}?", "Multiply {a} and {b}.", "{a} * {b}"))
    return ToolUse(
        kind="multiply",
        name="multiply",
        declaration=_declare("multiply", "Multiplies.", ["a: number,", "b: number,"]),
        question=question.format(a=a, b=b),
        arguments={"a": a, "b": b},
        output=_output(rng, {"result": a * b}),
        sentence=f"The result is {a * b}.",
    )


def _booking(rng: Random) -> ToolUse:
    name, key = rng.choice(("book_table", "reserve_table")), rng.choice(("people", "count"))
    place, people = draw_place(rng), rng.randint(1, 20)
    question = rng.choice(
        ("Book a table for {people} in {place}.", "A table for {people} in {place}, please.")
    )
    return ToolUse(
        kind="booking",
        name=name,
        declaration=_declare(name, "Books a table.", ["city: string,", f"{key}: number,"]),
        question=question.format(people=people, place=place),
        arguments={"city": place, key: people},
        output=_output(rng, {"status": "ok"}),
        sentence=f"A table for {people} in {place} is booked.",
    )
