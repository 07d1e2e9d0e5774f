"""Answers that are malformed or cut off, as they stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harmony_streams import check_stream, said, stream_answer
from harmony_texts import ANSWER, golden, marked
from hypothesis import given, settings
from hypothesis import strategies as st

import osscompile.nano
from osscompile.runtime.harmony import (
    Arguments,
    Finish,
    Piece,
    Reasoning,
    Text,
    ToolCall,
    as_messages,
    render_chat,
    stop_ids,
)
from osscompile.runtime.harmony.parse import AnswerParser
from osscompile.runtime.tokenizer import Tokenizer

NANO = Path(osscompile.nano.__file__).parent / "checkpoint" / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(NANO)


def parsed(tokenizer: Tokenizer, text: str) -> list[Piece]:
    """Return what an answer says, pieces of the same kind joined."""
    return said(stream_answer(marked(tokenizer, text), tokenizer))


def final(text: str, channel: str = "final") -> Text:
    return Text(channel, text)


def thought(text: str) -> Reasoning:
    return Reasoning("analysis", text)


def call(name: str, arguments: str, channel: str = "commentary", id: str = "call_0") -> list[Piece]:
    more: list[Piece] = [Arguments(channel, id, arguments)] if arguments else []
    return [ToolCall(channel, id, name), *more]


STOP, LENGTH, CALLS = Finish("stop"), Finish("length"), Finish("tool_calls")


def test_analysis_then_final(tokenizer: Tokenizer) -> None:
    assert parsed(tokenizer, ANSWER) == [thought("Think."), final("Four."), STOP]


def test_golden_call_after_which_nothing_is_the_assistants(tokenizer: Tokenizer) -> None:
    pieces = parsed(tokenizer, golden("streamable_parser"))
    assert [type(piece) for piece in pieces] == [Reasoning, ToolCall, Arguments, Finish]
    assert pieces[0].text.startswith('User asks "Who is')
    assert isinstance(pieces[1], ToolCall) and pieces[1].name == "browser.search"
    assert isinstance(pieces[2], Arguments) and json.loads(pieces[2].delta)["topn"] == 10
    assert pieces[3] == CALLS


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.f <|constrain|>json",
        "<|channel|>commentary to=functions.f<|constrain|>json",
        "<|channel|>commentary to=functions.f <|constrain|>JSON",
        "<|channel|>commentary to=functions.f json",
        "<|channel|>commentary to=functions.f",
        "<|channel|>commentary<|constrain|>json to=functions.f",
        "<|channel|>commentary <|constrain|>to=functions.f",
        "<|constrain|>json<|channel|>commentary to=functions.f",
        "<|channel|>commentary to=f",
        " to=functions.f<|channel|>commentary <|constrain|>json",
        " to=functions.f<|constrain|>json<|channel|>commentary",
        " to=functions.f<|channel|>commentary",
        " to=functions.f<|channel|>commentary to=functions.f",
        " to=functions.f<|channel|>commentary to=functions.other",
        "<|start|>assistant to=functions.f<|channel|>commentary json",
        " to=functions.f json",
        " to=functions.f <|constrain|>json",
        "<|channel|>commentary to=functions.f\n<|constrain|>json\n",
        "<|channel|>commentary to=functions.f <|constrain|><|channel|>analysis json",
        "<|channel|>commentary<|channel|>commentary to=functions.f json",
        "<|channel|>commentary? to=functions.f",
        "<|channel|>Commentary to=functions.f",
        "<|end|>commentary to=functions.f json",
        "<|end|>assistant commentary to=functions.f json",
        "<|end|>assistantcommentary to=functions.f json",
        "<|end|> to=functions.f<|channel|>commentary json",
    ],
)
def test_header_of_a_call(tokenizer: Tokenizer, header: str) -> None:
    text = header + '<|message|>{"a": 1}<|call|>'
    assert parsed(tokenizer, text) == [*call("f", '{"a": 1}'), CALLS]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        pytest.param(
            "<|channel|>commentary to=python <|constrain|><|channel|>analysis code"
            "<|message|>1+1<|call|>",
            [*call("python", "1+1"), CALLS],
            id="another_channel_after_constrain",
        ),
        pytest.param(
            "<|channel|>analysis to=python code<|message|>1+1<|call|>",
            [*call("python", "1+1", "analysis"), CALLS],
            id="builtin_on_analysis",
        ),
        pytest.param(
            '<|channel|>commentary to=functions.f {"a": 1}<|call|>',
            [*call("f", '{"a": 1}'), CALLS],
            id="call_without_message",
        ),
        pytest.param(
            ' to=functions.f {"a": 1}<|call|>',
            [*call("f", '{"a": 1}'), CALLS],
            id="call_without_channel_and_message",
        ),
        pytest.param(
            '<|channel|>commentary to=functions.f <|constrain|>json{"a": 1}<|call|>',
            [*call("f", '{"a": 1}'), CALLS],
            id="call_without_message_and_blank",
        ),
        pytest.param(
            '<|channel|>commentary to=functions.f{"a": 1}<|call|>',
            [*call("f", '{"a": 1}'), CALLS],
            id="arguments_at_the_name",
        ),
        pytest.param(
            "<|channel|>analysis to=python code = 5<|call|>",
            [*call("python", "code = 5", "analysis"), CALLS],
            id="type_that_is_a_name_in_code",
        ),
        pytest.param(
            "<|channel|>analysis to=python code print(5)<|call|>",
            [*call("python", "print(5)", "analysis"), CALLS],
            id="type_before_code",
        ),
        pytest.param(
            "<|channel|>commentary to=functions.f<|call|>",
            [*call("f", ""), CALLS],
            id="call_without_arguments",
        ),
        pytest.param(
            "<|channel|>commentary to=a<|message|>1<|end|>"
            "<|start|>assistant<|channel|>commentary to=b<|message|>2<|call|>",
            [*call("a", "1"), *call("b", "2", id="call_1"), CALLS],
            id="two_calls",
        ),
        pytest.param(
            "<|channel|>commentary<|message|>I look.<|end|>"
            "<|start|>assistant to=f<|channel|>commentary<|message|>{}<|call|>",
            [final("I look.", "commentary"), *call("f", "{}"), CALLS],
            id="preamble_then_call",
        ),
        pytest.param(
            "<|channel|>commentary to=f<|message|>{}<|return|>",
            [*call("f", "{}"), CALLS],
            id="call_that_return_ends",
        ),
        pytest.param(
            "<|channel|>commentary to=assistant<|message|>Hm<|end|>",
            [final("Hm", "commentary"), LENGTH],
            id="recipient_that_is_no_tool",
        ),
        pytest.param(
            '<|channel|>commentary to=f please <|message|>{"a"<|call|>',
            [final("please ", "commentary"), *call("f", '{"a"'), CALLS],
            id="text_in_the_header_of_a_call",
        ),
        pytest.param(
            "<|channel|>final The answer is 42.<|return|>",
            [final("The answer is 42."), STOP],
            id="text_in_a_header",
        ),
        pytest.param(
            "<|channel|>final\nThe answer\nis 42.<|return|>",
            [final("The answer\nis 42."), STOP],
            id="newline_in_a_header",
        ),
        pytest.param(
            "<|channel|>final final answer<|return|>",
            [final("final answer"), STOP],
            id="text_that_begins_like_its_channel",
        ),
        pytest.param(
            "<|channel|>The answer is 42.<|return|>",
            [final("The answer is 42."), STOP],
            id="text_in_a_header_without_channel",
        ),
        pytest.param(
            "<|channel|>So analysis it is<|message|> now.<|return|>",
            [thought("So analysis it is now."), STOP],
            id="channel_amid_text",
        ),
        pytest.param(
            "<|channel|>commentary Hello<|end|>",
            [final("Hello", "commentary"), LENGTH],
            id="text_in_a_header_then_end",
        ),
        pytest.param(
            "<|channel|>analysis Two and two.<|channel|>final<|message|>Four.<|return|>",
            [thought("Two and two."), final("Four."), STOP],
            id="text_in_a_header_then_a_header",
        ),
        pytest.param(
            "<|channel|>analysis Two.<|start|>assistant<|channel|>final<|message|>Four.<|return|>",
            [thought("Two."), final("Four."), STOP],
            id="text_in_a_header_then_start",
        ),
        pytest.param(
            f"<|channel|>final {'word ' * 300}<|message|>end<|return|>",
            [final(f"{'word ' * 300}end"), STOP],
            id="header_of_hundreds_of_tokens",
        ),
        pytest.param(
            f"<|channel|>commentary to=f {'word ' * 300}<|call|>",
            [*call("f", "word " * 300), CALLS],
            id="call_of_hundreds_of_tokens",
        ),
        pytest.param(
            f"{'word ' * 300}<|return|>", [final("word " * 300), STOP], id="no_header_at_all"
        ),
        pytest.param(
            "<|channel|>final <|constrain|>json<|message|>{}<|return|>",
            [final("{}"), STOP],
            id="content_type_is_no_recipient",
        ),
        pytest.param(
            "<|channel|>final json<|message|>{}<|return|>", [final("{}"), STOP], id="bare_type"
        ),
        pytest.param(
            "<|channel|>final <|constrain|>The answer<|return|>",
            [final("The answer"), STOP],
            id="constrain_then_text",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>A<|end|>final<|message|>Four.<|return|>",
            [thought("A"), final("Four."), STOP],
            id="header_without_start",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>A<|end|>"
            'commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
            [thought("A"), *call("f", '{"a": 1}'), CALLS],
            id="header_of_a_call_without_start",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>A<|end|><|channel|>final<|message|>B<|return|>",
            [thought("A"), final("B"), STOP],
            id="channel_without_start",
        ),
        pytest.param(
            "Let me think.<|channel|>final<|message|>Four.<|return|>",
            [thought("Let me think."), final("Four."), STOP],
            id="text_before_the_first_header",
        ),
        pytest.param(
            "Let me think.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>",
            [thought("Let me think."), final("Four."), STOP],
            id="ended_text_before_the_first_header",
        ),
        pytest.param(
            "Let me<|start|>assistant<|channel|>final<|message|>Four.<|return|>",
            [thought("Let me"), final("Four."), STOP],
            id="text_then_start",
        ),
        *(
            pytest.param(
                f"{text}{header}final<|message|>Four.<|return|>",
                [thought(text), final("Four."), STOP],
                id=f"{id}_that_begins_like_a_header_then_{where}",
            )
            for id, text in (
                ("text", "final answer is near"),
                ("thought", "analysis of it."),
                ("assistant", "assistant commentary here"),
            )
            for where, header in (
                ("channel", "<|channel|>"),
                ("start", "<|start|>assistant<|channel|>"),
                ("end", "<|end|><|start|>assistant<|channel|>"),
            )
        ),
        pytest.param(
            "final answer is near<|channel|>musing<|message|>Four.<|return|>",
            [thought("final answer is near"), final("Four.", "musing"), STOP],
            id="text_that_begins_like_a_header_then_an_unknown_channel",
        ),
        pytest.param(
            "analysis of it.<|channel|>commentary to=f<|message|>{}<|call|>",
            [thought("analysis of it."), *call("f", "{}"), CALLS],
            id="text_that_begins_like_a_header_then_a_call",
        ),
        pytest.param(
            "analysis of it.<|channel|><|message|>Four.<|return|>",
            [thought("of it.Four."), STOP],
            id="text_that_begins_like_a_header_then_no_channel",
        ),
        pytest.param(
            "Let me<|message|>Four.<|return|>",
            [thought("Let me"), final("Four."), STOP],
            id="text_then_message",
        ),
        pytest.param(
            "<|channel|>final<|message|>A<|end|><|start|>user<|message|>And?<|end|>",
            [final("A"), STOP],
            id="user_after_final",
        ),
        pytest.param(
            "<|channel|>final<|message|>A<|end|><|start|>user<|channel|>final<|end|>",
            [final("A"), STOP],
            id="user_after_final_without_message",
        ),
        pytest.param(
            "<|start|>user guide is here<|return|>",
            [final("user guide is here"), STOP],
            id="role_that_begins_a_text",
        ),
        pytest.param(
            "<|start|>python is a language<|return|>",
            [final("python is a language"), STOP],
            id="tool_that_begins_a_text",
        ),
        pytest.param(
            "<|channel|>final<|message|>a<|end|><|start|>assistants help<|return|>",
            [final("aassistants help"), STOP],
            id="longer_word_than_assistant",
        ),
        pytest.param(
            "<|end|>assistant of mine<|channel|>final<|message|>a<|return|>",
            [thought("assistant of mine"), final("a"), STOP],
            id="assistant_that_begins_a_text",
        ),
        pytest.param(
            "<|channel|>final text of the law<|message|>x<|return|>",
            [final("text of the lawx"), STOP],
            id="type_that_begins_a_text",
        ),
        pytest.param(
            "<|end|>final code follows<|message|>x<|return|>",
            [thought("code follows"), final("x"), STOP],
            id="type_that_begins_a_text_without_start",
        ),
        pytest.param(
            "<|channel|>final <|constrain|>json is great<|return|>",
            [final("json is great"), STOP],
            id="constrain_then_text_that_begins_like_a_type",
        ),
        pytest.param(
            "<|channel|>final <|constrain|>The answer<|message|>x<|return|>",
            [final("The answerx"), STOP],
            id="constrain_then_text_then_message",
        ),
        pytest.param(
            "<|channel|>commentary <|constrain|>functions.f<|message|>{}<|call|>",
            [*call("f", "{}"), CALLS],
            id="recipient_after_constrain",
        ),
        pytest.param(
            "<|channel|>commentary <|constrain|>functions.f json<|message|>{}<|call|>",
            [*call("f", "{}"), CALLS],
            id="recipient_and_type_after_constrain",
        ),
        pytest.param(
            "<|channel|>final<|message|>A<|end|>user<|message|>And?<|end|>",
            [final("A"), STOP],
            id="user_without_start",
        ),
        pytest.param(
            "<|channel|>final<|message|>A<|start|>users of it<|return|>",
            [final("Ausers of it"), STOP],
            id="text_that_begins_like_a_role",
        ),
        pytest.param(
            "<|channel|>commentary to=functions.f<|message|>{}<|end|>"
            "<|start|>functions.f to=assistant<|channel|>commentary<|message|>5<|end|>",
            [*call("f", "{}"), CALLS],
            id="made_up_result_of_a_function",
        ),
        pytest.param(
            "<|start|>functions.f<|message|>5<|end|>", [STOP], id="functions_text_is_not_said"
        ),
        pytest.param(
            "<|start|>get_weather to=assistant<|channel|>commentary<|message|>5<|end|>",
            [STOP],
            id="made_up_result_of_a_bare_name",
        ),
        pytest.param(
            "<|start|>assistant to=assistant<|channel|>final<|message|>Hi",
            [final("Hi"), LENGTH],
            id="to_itself",
        ),
        pytest.param(
            "<|start|>analysis to=assistant<|message|>Hi",
            [thought("Hi"), LENGTH],
            id="channel_for_a_role",
        ),
        pytest.param("", [LENGTH], id="nothing"),
        pytest.param("Hello there<|return|>", [final("Hello there"), STOP], id="text_only"),
        pytest.param("to be, or not<|return|>", [final("to be, or not"), STOP], id="to_be"),
        pytest.param("as<|return|>", [final("as"), STOP], id="begins_like_assistant"),
        pytest.param("assistants help", [final("assistants help"), LENGTH], id="assistants"),
        pytest.param("<|message|>Hi<|return|>", [final("Hi"), STOP], id="missing_channel"),
        pytest.param("<|channel|><|message|>Hi", [final("Hi"), LENGTH], id="empty_channel"),
        pytest.param("<|start|>assistant<|message|>Hi", [final("Hi"), LENGTH], id="only_a_role"),
        pytest.param("<|start|>assistant Hello", [final(" Hello"), LENGTH], id="role_then_text"),
        pytest.param(
            "<|end|><|start|>assistant:bob<|channel|>final<|message|>Hi",
            [final("Hi"), LENGTH],
            id="role_with_a_name",
        ),
        pytest.param("assistant<|channel|>final<|message|>Hi", [final("Hi"), LENGTH], id="role"),
        pytest.param("<|channel|>final<|message|><|return|>", [STOP], id="empty_answer"),
        pytest.param(
            "<|channel|>analysis<|channel|>final<|message|>Hi",
            [thought("Hi"), LENGTH],
            id="first_of_two_channels",
        ),
        pytest.param(
            "<|channel|>musing<|message|>Hm", [final("Hm", "musing"), LENGTH], id="unknown_channel"
        ),
        pytest.param(
            "<|channel|>Final<|message|>Hm", [final("Hm"), LENGTH], id="channel_in_capitals"
        ),
        pytest.param(
            "<|channel|>musing<|channel|>final<|message|>Hm",
            [thought("musing"), final("Hm"), LENGTH],
            id="unknown_channel_then_another",
        ),
        pytest.param(
            "<|channel|>musing <|constrain|>final<|message|>Hm",
            [thought("musing"), final("Hm"), LENGTH],
            id="unknown_channel_then_constrain",
        ),
        pytest.param("\n<|end|>" * 40 + "<|return|>", [STOP], id="nothing_but_newlines"),
        pytest.param(
            "<|channel|>analysis<|message|>A<|channel|>final<|message|>B",
            [thought("A"), final("B"), LENGTH],
            id="channel_in_a_message",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>A<|start|>assistant<|channel|>final<|message|>B",
            [thought("A"), final("B"), LENGTH],
            id="start_in_a_message",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>A<|end|>B<|return|>",
            [thought("A"), final("B"), STOP],
            id="text_after_a_message",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>A<|end|>\n<|start|>assistant<|message|>B",
            [thought("A"), final("B"), LENGTH],
            id="newline_between_messages",
        ),
        pytest.param(
            "<|channel|>final<|message|>A<|return|>B<|endoftext|>C",
            [final("A"), STOP],
            id="nothing_after_the_end",
        ),
        pytest.param(
            "<|channel|>final<|message|>A<|message|>B<|constrain|>C",
            [final("ABC"), LENGTH],
            id="special_tokens_in_a_message",
        ),
        pytest.param("<|channel|>final<|return|>", [STOP], id="nothing_but_a_header"),
        pytest.param("<|end|><|end|><|return|>", [STOP], id="nothing_but_ends"),
    ],
)
def test_stream(tokenizer: Tokenizer, text: str, pieces: list[Piece]) -> None:
    assert parsed(tokenizer, text) == pieces


WHOLE = (
    "<|channel|>analysis<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.find_it <|constrain|>json<|message|>{"q": "🙂"}<|call|>'
)


def test_cut_off_at_every_token(tokenizer: Tokenizer) -> None:
    """A cut shows the beginning of what would be said, and nothing of a header."""
    ids = marked(tokenizer, WHOLE)
    whole = [thought("Let me look."), *call("find_it", '{"q": "🙂"}'), CALLS]
    assert said(stream_answer(ids, tokenizer)) == whole
    for length in range(len(ids)):
        *pieces, end = said(stream_answer(ids[:length], tokenizer))
        assert end == LENGTH
        texts = ["".join(p.text for p in some if isinstance(p, Reasoning)) for some in (pieces,)]
        assert "Let me look.".startswith(texts[0])
        rest = [p for p in pieces if not isinstance(p, Reasoning)]
        assert rest == [] or rest[0] == whole[1]
        for piece in rest[1:]:
            assert isinstance(piece, Arguments)
            assert '{"q": "🙂"}'.startswith(piece.delta.rstrip("\ufffd"))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("<|channel|>analysis", [LENGTH]),
        ("<|channel|>ana", [LENGTH]),
        ("<|start|>assis", [LENGTH]),
        ("<|channel|>commentary to", [LENGTH]),
        ("<|channel|>commentary to=functions.lo", [LENGTH]),
        ("<|channel|>commentary to=functions.look <|constrain|>js", [LENGTH]),
        ("Hm.<|channel|>commentary to=functions.lo", [thought("Hm."), LENGTH]),
        ("Hm.<|end|><|start|>assistant<|channel|>fi", [final("Hm."), LENGTH]),
        ("<|channel|>final The way to", [final("The way to"), LENGTH]),
        ("The way to", [final("The way to"), LENGTH]),
        ("final answer is near<|channel|>", [final("final answer is near"), LENGTH]),
        ("final answer is near<|channel|>fi", [final("final answer is near"), LENGTH]),
    ],
)
def test_cut_off_in_a_header(tokenizer: Tokenizer, text: str, pieces: list[Piece]) -> None:
    assert parsed(tokenizer, text) == pieces


def test_pieces_stream_as_the_ids_come(tokenizer: Tokenizer) -> None:
    parser = AnswerParser(tokenizer)
    pushed = [parser.push(id) for id in marked(tokenizer, ANSWER)]
    pieces = [piece for some in pushed for piece in some]
    assert max(map(len, pushed)) == 1
    assert len(pieces) == len(tokenizer.encode("Think.")) + len(tokenizer.encode("Four.")) + 1
    assert all(piece.text for piece in pieces[:-1])
    assert parser.ended and parser.finish() == [] and parser.push(1) == []


def test_arguments_stream_as_the_ids_come(tokenizer: Tokenizer) -> None:
    ids = marked(tokenizer, "<|channel|>commentary to=f<|message|>")
    parser = AnswerParser(tokenizer)
    assert [piece for id in ids for piece in parser.push(id)] == call("f", "")
    for id in tokenizer.encode('{"a": 1}'):
        assert parser.push(id) == [Arguments("commentary", "call_0", tokenizer.decode([id]))]


@pytest.mark.parametrize("text", ["word " * 40, "<|channel|>final " + "word " * 40])
def test_text_is_held_back_for_32_tokens_only(tokenizer: Tokenizer, text: str) -> None:
    parser = AnswerParser(tokenizer)
    ids = marked(tokenizer, text)
    first = next(i for i, id in enumerate(ids, 1) if parser.push(id))
    assert first - text.startswith("<|channel|>") == 32


@pytest.mark.parametrize(
    "name",
    [
        "mcp__github__list_repository_pull_request_review_comments_by_use",
        "0123456789abcdef" * 16,
        "größenänderung_" * 14,
    ],
)
@pytest.mark.parametrize(
    "header",
    [
        " to=functions.{}<|channel|>commentary <|constrain|>json",
        "<|channel|>commentary to=functions.{} <|constrain|>json",
        "<|channel|>commentary to=functions.{} json",
        "<|channel|>commentary <|constrain|>functions.{}",
        "Hm. <|end|><|start|>assistant<|channel|>commentary to=functions.{} code",
    ],
)
def test_name_of_more_than_32_tokens(tokenizer: Tokenizer, name: str, header: str) -> None:
    assert len(tokenizer.encode(name)) > 32
    told = parsed(tokenizer, f'{header.format(name)}<|message|>{{"a": 1}}<|call|>')
    assert told[-3:] == [*call(name, '{"a": 1}'), CALLS]
    assert len(told) == 3 + header.startswith("Hm.")


def test_name_without_an_end_is_held_back_for_the_longest(tokenizer: Tokenizer) -> None:
    parser = AnswerParser(tokenizer)
    ids = marked(tokenizer, f"Send it to={'ab' * 1000}")
    first = next(i for i, id in enumerate(ids, 1) if parser.push(id))
    assert 32 < first < 32 + 256 + 16


@pytest.mark.parametrize("num_words", range(26, 33))
def test_text_that_is_held_back_does_not_shorten_a_header(
    tokenizer: Tokenizer, num_words: int
) -> None:
    """Wherever the limit falls in the header that follows, nothing of it is text."""
    text = "a" + " a" * (num_words - 1)
    assert len(tokenizer.encode(text)) == num_words
    result = "<|start|>get_weather to=assistant<|channel|>commentary<|message|>5"
    assert parsed(tokenizer, f"{text}<|end|>{result}") == [final(text), STOP]


def test_incomplete_characters_are_held_back(tokenizer: Tokenizer) -> None:
    ids = marked(tokenizer, "<|channel|>final<|message|>👍東")
    parser = AnswerParser(tokenizer)
    texts = [piece.text for id in ids for piece in parser.push(id)]
    assert texts == ["👍", "東"]
    cut = AnswerParser(tokenizer)
    assert [piece.text for id in ids[:-1] for piece in cut.push(id)] == ["👍"]
    assert cut.finish() == [final("\ufffd"), LENGTH]


def test_finish_tells_why(tokenizer: Tokenizer) -> None:
    ids = marked(tokenizer, "<|channel|>commentary to=f<|message|>{}")
    for reason, expected in (("length", LENGTH), ("stop", CALLS)):
        parser = AnswerParser(tokenizer)
        for id in ids:
            parser.push(id)
        assert parser.finish(reason) == [expected]


def test_endless_headers_stay_small(tokenizer: Tokenizer) -> None:
    parser = AnswerParser(tokenizer)
    for _ in range(1000):
        for id in marked(tokenizer, "<|channel|><|constrain|>"):
            parser.push(id)
    assert len(parser._segments or ()) < 4


def test_stop_ids_are_return_call_and_endoftext(tokenizer: Tokenizer) -> None:
    names = {tokenizer.decode([id]) for id in stop_ids(tokenizer)}
    assert names == {"<|return|>", "<|call|>", "<|endoftext|>"}


def test_messages_of_an_answer(tokenizer: Tokenizer) -> None:
    pieces = list(stream_answer(marked(tokenizer, WHOLE), tokenizer))
    function = {"name": "find_it", "arguments": '{"q": "🙂"}'}
    assert as_messages(pieces) == [
        {"role": "assistant", "channel": "analysis", "content": "Let me look."},
        {
            "role": "assistant",
            "channel": "commentary",
            "content": None,
            "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
        },
    ]


def test_messages_on_one_channel_stay_two(tokenizer: Tokenizer) -> None:
    """What the prompt has of an answer is what the model wrote."""
    header = "<|start|>assistant<|channel|>commentary<|message|>"
    text = f"{header}One.<|end|>{header}Two.<|end|>"
    pieces = list(stream_answer(marked(tokenizer, text), tokenizer))
    assert [p.text for p in pieces if p.begins] == ["O", "T"]  # tokens of nano
    messages = [{"role": "user", "content": "Hi"}, *as_messages(pieces)]
    assert text in tokenizer.decode(render_chat(messages, tokenizer))


def test_stop_string_is_within_one_message(tokenizer: Tokenizer) -> None:
    """A beginning of it that was held back belongs to the message before."""
    header = "<|start|>assistant<|channel|>final<|message|>"
    ids = marked(tokenizer, f"{header}a.<|end|>{header}.b.c<|return|>")
    pieces = list(stream_answer(ids, tokenizer, ("..",)))
    contents = [message["content"] for message in as_messages(pieces)]
    assert contents == ["a.", ".b.c"]


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(st.randoms(use_true_random=False))
def test_random_streams(tokenizer: Tokenizer, random: object) -> None:
    """harmony_streams.py says how to try a million of them."""
    check_stream(tokenizer, random)
