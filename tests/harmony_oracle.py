"""The same conversations for openai-harmony, which judges the renderer, and random ones."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["", "Hello", "a<|end|>b", "1\n\n2\r\n", "naïve 東京 👩‍👩‍👧", " x ", "// */ }"]
)
WORDS = st.sampled_from(["f", "get_weather", "g2", "looks_up", "名前", "python", "h-1"])
KEYS = st.sampled_from(["a", "b", "location", "unit", "is_it", "x y", "", "é"])
# openai-harmony's reader of JSON gives the last digit of longer numbers wrong.
FLOATS = st.builds(
    lambda digits, exponent: float(f"{digits}e{exponent}"),
    st.integers(-(10**6), 10**6),
    st.integers(-20, 20),
)
NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1) | FLOATS | st.just(1 << 64)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=4,
)


def _with_remarks(schema: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    remarks = st.fixed_dictionaries(
        {},
        optional={
            "description": TEXTS,
            "title": TEXTS,
            "default": VALUES,
            "nullable": st.booleans(),
            "examples": st.lists(TEXTS | NUMBERS, max_size=2),
            "enum": st.lists(TEXTS | NUMBERS, max_size=3),
        },
    )
    return st.builds(lambda a, b: {**a, **b}, schema, remarks)


def _larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = st.fixed_dictionaries(
        {"type": st.just("object")},
        optional={
            "properties": st.dictionaries(KEYS, inner, max_size=4),
            "required": st.lists(KEYS, max_size=2),
        },
    )
    arrays = st.fixed_dictionaries({"type": st.just("array")}, optional={"items": inner})
    choices = st.fixed_dictionaries({"oneOf": st.lists(inner, max_size=3)})
    others = st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=2)})
    return _with_remarks(objects | arrays | choices | others)


KINDS = ["string", "number", "integer", "boolean", "null", "array", "object", "file"]
PLAIN = st.sampled_from(KINDS) | st.lists(st.sampled_from(KINDS), max_size=3)
SCHEMAS = st.recursive(
    _with_remarks(st.fixed_dictionaries({}, optional={"type": PLAIN})) | st.booleans(),
    _larger,
    max_leaves=8,
)
PARAMETERS = st.none() | SCHEMAS.filter(lambda schema: isinstance(schema, dict))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages in OpenAI's shapes, and options of render_chat."""
    names = draw(st.lists(WORDS, max_size=3, unique=True))
    tools = [
        {"type": "function", "function": {"name": n, "description": draw(TEXTS)}} for n in names
    ]
    for tool in tools:
        parameters = draw(PARAMETERS)
        if parameters is not None:
            tool["function"]["parameters"] = parameters
    options: dict[str, Any] = {
        "reasoning": draw(st.sampled_from(["low", "medium", "high"])),
        "current_date": draw(st.none() | st.just("2025-06-28") | TEXTS),
        "builtin_tools": draw(st.lists(st.sampled_from(["browser", "python"]), max_size=2)),
        "tools": tools,
    }
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    calls: list[str] = []
    for _ in range(draw(st.integers(0, 6))):
        messages.append(draw(_messages(calls)))
        calls += [call["id"] for call in messages[-1].get("tool_calls") or ()]
    return [*messages, {"role": "user", "content": draw(TEXTS)}], options


@st.composite
def _messages(draw: st.DrawFn, calls: list[str]) -> dict[str, Any]:
    roles = ["user", "assistant", "assistant", "developer", *(["tool", "tool"] if calls else [])]
    role = draw(st.sampled_from(roles))
    text = draw(TEXTS)
    content = draw(st.just(text) | st.just([{"type": "text", "text": text}]))
    if role == "tool":
        return {"role": role, "tool_call_id": draw(st.sampled_from(calls)), "content": content}
    if role == "user":
        name = draw(st.none() | st.just("ann"))
        return {"role": role, "content": content, **({"name": name} if name else {})}
    if role == "developer":
        return {"role": role, "content": content}
    message = {"role": role, "content": content, "refusal": None}
    if draw(st.booleans()):
        message["reasoning_content"] = draw(TEXTS)
    if draw(st.booleans()):
        message["channel"] = draw(st.sampled_from(["analysis", "commentary", "final", "odd"]))
    if draw(st.booleans()):
        names = draw(st.lists(WORDS | st.just("browser.search"), max_size=2))
        message["content"] = draw(st.just(content) | st.none()) if names else content
        message["tool_calls"] = [
            {
                "id": f"id{len(calls) + i}",
                "type": "function",
                "function": {"name": name, "arguments": draw(TEXTS)},
            }
            for i, name in enumerate(names)
        ]
    return message


def render_with_harmony(
    encoding: Any, messages: list[dict[str, Any]], options: dict[str, Any]
) -> list[int]:
    """Return openai-harmony's ids for messages and options in the shapes above."""
    import openai_harmony as harmony

    system = harmony.SystemContent.new()
    if options.get("current_date") is not None:
        system = system.with_conversation_start_date(options["current_date"])
    effort = harmony.ReasoningEffort(options.get("reasoning", "medium").capitalize())
    system = system.with_reasoning_effort(effort)
    for name in options.get("builtin_tools", ()):
        tool = {"browser": system.with_browser_tool, "python": system.with_python_tool}[name]
        system = tool()
    functions = [tool["function"] for tool in options.get("tools", ())]
    leading = []
    rest = list(messages)
    while rest and rest[0]["role"] in ("system", "developer"):
        leading.append(_text(rest.pop(0)["content"]))
    instructions = "\n\n".join(text for text in leading if text)
    theirs = [harmony.Message.from_role_and_content(harmony.Role.SYSTEM, system)]
    if instructions or functions:
        developer = harmony.DeveloperContent.new()
        if instructions:
            developer = developer.with_instructions(instructions)
        if functions:
            descriptions = [
                harmony.ToolDescription.new(f["name"], f["description"], f.get("parameters"))
                for f in functions
            ]
            developer = developer.with_function_tools(descriptions)
        theirs.append(harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, developer))
    declared = {function["name"] for function in functions}
    called: dict[str, Any] = {}
    for message in rest:
        theirs += _their_messages(message, declared, called)
    conversation = harmony.Conversation.from_messages(theirs)
    rendered = encoding.render_conversation_for_completion(conversation, harmony.Role.ASSISTANT)
    return list(rendered)


def _their_messages(message: dict[str, Any], declared: set[str], called: dict[str, Any]) -> Any:
    import openai_harmony as harmony

    role, content = message["role"], message.get("content")
    if role == "developer":
        developer = harmony.DeveloperContent.new()
        if _text(content):
            developer = developer.with_instructions(_text(content))
        return [harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, developer)]
    if role == "user":
        author = harmony.Author(role=harmony.Role.USER, name=message.get("name"))
        return [harmony.Message.from_author_and_content(author, _text(content))]
    if role == "tool":
        recipient, channel = called[message["tool_call_id"]]
        author = harmony.Author(role=harmony.Role.TOOL, name=recipient)
        result = harmony.Message.from_author_and_content(author, _text(content))
        return [result.with_channel(channel).with_recipient("assistant")]

    def said(text: str, channel: str) -> Any:
        turn = harmony.Message.from_role_and_content(harmony.Role.ASSISTANT, text)
        return turn.with_channel(channel)

    calls, channel = message.get("tool_calls") or [], message.get("channel")
    theirs = []
    if message.get("reasoning_content"):
        theirs.append(said(message["reasoning_content"], "analysis"))
    if content is not None and (_text(content) or not calls):
        theirs.append(said(_text(content), channel or ("commentary" if calls else "final")))
    own = None if content is not None and _text(content) else channel
    for call in calls:
        name = call["function"]["name"]
        if name not in declared and name in ("python", "browser.search"):
            recipient, where, content_type = name, own or "analysis", "code"
        else:
            recipient, where = f"functions.{name}", own or "commentary"
            content_type = "<|constrain|>json"
        called[call["id"]] = (recipient, where)
        turn = said(call["function"]["arguments"], where).with_recipient(recipient)
        theirs.append(turn.with_content_type(content_type))
    return theirs


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
