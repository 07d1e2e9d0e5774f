"""The chat of `run` at a terminal: it survives what people and models do."""

from __future__ import annotations

import json
import os
import signal
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pseudo_terminal import CTRL_C, CTRL_D, PATIENCE_SECONDS, SETTLING_SECONDS, PseudoTerminal

SPEAKER = [sys.executable, Path(__file__).with_name("speaker.py")]
GREETING_END = "ends the chat.\n"


@pytest.fixture
def chat() -> Iterator[PseudoTerminal]:
    terminal = PseudoTerminal(SPEAKER)
    terminal.wait_for(GREETING_END)
    terminal.wait_for("> ")
    yield terminal
    terminal.process.kill()


def asked(shown: str) -> list[str]:
    """The contents of the messages in an answer of the speaker."""
    start = shown.index('{"messages"')
    answer, _ = json.JSONDecoder().raw_decode(shown[start:].replace("\n", ""))
    return [message["content"] for message in answer["messages"]]


def finish(terminal: PseudoTerminal) -> None:
    terminal.send("/bye\r")
    assert terminal.end() == 0, terminal.seen
    assert "Traceback" not in terminal.seen


def test_history_is_kept_until_reset(chat: PseudoTerminal) -> None:
    assert asked(chat.ask("one")) == ["one"]
    second = asked(chat.ask("two"))
    assert (second[0], second[-1], len(second)) == ("one", "two", 4)
    assert "a new conversation" in chat.ask("/reset")
    assert asked(chat.ask("three")) == ["three"]
    finish(chat)


def test_nano_goes_on_after_an_interrupt_and_a_full_context(nano_artifact: Path) -> None:
    command = [sys.executable, "-m", "osscompile", "run", nano_artifact, "--context", "200"]
    terminal = PseudoTerminal(command)
    terminal.wait_for(GREETING_END)
    terminal.wait_for("> ")
    assert "2 + 2 = 4" in terminal.ask("What is 2 + 2?")
    assert "at most 200 tokens" in terminal.ask("1 + 1? " * 60)
    assert "3 + 4 = 7" in terminal.ask("What is 3 + 4?")
    finish(terminal)


def test_empty_lines_are_no_messages_and_no_end(chat: PseudoTerminal) -> None:
    chat.send("\r")
    chat.wait_for("> ")
    assert asked(chat.ask("one")) == ["one"]
    chat.send(CTRL_D)
    assert chat.end() == 0


def test_line_that_is_not_utf8(chat: PseudoTerminal) -> None:
    chat.send(b"\xff\r")
    assert "input: expected utf-8 text" in chat.wait_for("> ")
    assert asked(chat.ask("one")) == ["one"]
    finish(chat)


@pytest.mark.parametrize("line", [b"a\xc3(b", b"a\xc3", b"\xf0\x9f\x98 b", b"caf\xc3\xa9 \xe2\x82"])
def test_bytes_that_only_begin_a_character(chat: PseudoTerminal, line: bytes) -> None:
    """readline waits for the rest: what does not come is told, and is not in the next line."""
    chat.send(line + b"\r")
    assert "input: expected utf-8 text" in chat.wait_for("\n> ")
    assert asked(chat.ask("caf\u00e9", until="}\n> ")) == ["caf\u00e9"]
    finish(chat)


@pytest.mark.parametrize(
    "settings",
    ["", "set editing-mode vi", r'"\C-h": backward-kill-word', r'"\C-e": kill-whole-line'],
)
def test_return_leaves_the_line_as_it_is(tmp_path: Path, settings: str) -> None:
    """Also amid the line while characters are overwritten, and for who has bound other keys."""
    pytest.importorskip("readline")
    (tmp_path / "inputrc").write_text(settings + "\n")
    terminal = PseudoTerminal(SPEAKER, env={"INPUTRC": str(tmp_path / "inputrc")})
    terminal.wait_for("> ")
    terminal.send("two words\033[D\033[D\033[2~\r")
    assert asked(terminal.wait_for("}\n> ")) == ["two words"]
    finish(terminal)


def test_full_context_and_odd_channels(chat: PseudoTerminal) -> None:
    shown = chat.ask("too long")
    assert "expected at most 4096 tokens" in shown and "/reset" in shown
    assert "odd" in chat.ask("odd")
    assert "f: \033[0m\033[2m{" in chat.ask("call")
    assert "too long" not in asked(chat.ask("one")) and "interrupted" not in chat.seen
    finish(chat)


def test_interrupt_ends_the_answer_and_keeps_what_was_said(chat: PseudoTerminal) -> None:
    chat.send("endless\r")
    chat.wait_for("5 6 7")
    chat.send(CTRL_C)
    assert "what was said is kept" in chat.wait_for("\n> ")
    contents = asked(chat.ask("one"))
    assert contents[0] == "endless" and contents[-2].startswith("0 1 2 3 4 5 6 7")
    finish(chat)


def test_many_interrupts_at_once_end_one_answer(chat: PseudoTerminal) -> None:
    chat.send("endless\r")
    chat.wait_for("5 6 7")
    chat.send(CTRL_C * 2)
    chat.wait_for("> ")
    assert asked(chat.ask("one"))[-1] == "one"
    finish(chat)


def test_interrupts_at_the_prompt(chat: PseudoTerminal) -> None:
    """The first clears what was typed, the next ends the chat."""
    chat.send("half a li")
    chat.wait_for("half a li")
    chat.interrupt()
    chat.wait_for("Ctrl-C again")
    chat.wait_for("> ")
    assert asked(chat.ask("one")) == ["one"]
    chat.interrupt()
    chat.wait_for("Ctrl-C again")
    chat.wait_for("> ")
    chat.interrupt()
    assert chat.end() == 0


def test_lines_pasted_at_once_are_one_message(chat: PseudoTerminal) -> None:
    chat.send("one\rtwo\r\rthree\r")
    assert asked(chat.wait_for("}\n> ")) == ["one\ntwo\n\nthree"]
    chat.send('"""four\r')
    chat.wait_for("... ")
    chat.ask("five", until="... ")
    chat.send('six"""\r')
    assert asked(chat.wait_for("}\n> "))[-1] == "four\nfive\nsix"
    finish(chat)


def test_slow_paste_in_brackets_is_one_message(chat: PseudoTerminal) -> None:
    if "libedit" in (pytest.importorskip("readline").__doc__ or ""):
        pytest.skip("this readline knows no brackets")
    assert chat.brackets_pastes
    chat.send("\033[200~one\r")
    time.sleep(SETTLING_SECONDS)
    chat.send("two\033[201~\r")
    assert asked(chat.wait_for("}\n> ")) == ["one\ntwo"]
    finish(chat)


def test_earlier_lines_come_back(chat: PseudoTerminal) -> None:
    pytest.importorskip("readline")
    chat.ask("one")
    chat.send("\033[A!\r")  # the key up
    assert asked(chat.wait_for("}\n> "))[-1] == "one!"
    finish(chat)


def test_commands(chat: PseudoTerminal) -> None:
    assert "/save FILE" in chat.ask("/help")
    assert "expected one of low, medium, high, found 'huge'" in chat.ask("/effort huge")
    assert "expected one of /effort, /reset, /save" in chat.ask("/exit")
    assert "/save: expected the name of a file" in chat.ask("/save")
    assert "reasoning effort: high" in chat.ask("/effort high")
    assert '"reasoning": "high"' in chat.ask("one").replace("\n", "")
    finish(chat)


def test_conversation_is_saved_and_loaded(chat: PseudoTerminal, tmp_path: Path) -> None:
    file, other = tmp_path / "a file.json", tmp_path / "other.json"
    chat.ask("caf\u00e9", until="}\n> ")
    assert f"wrote {file}" in chat.ask(f"/save {file}")
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert [m["role"] for m in saved] == ["user", "assistant", "assistant"]
    other.write_text("mine")
    assert "other.json: expected a new file" in chat.ask(f"/save {other}")
    assert other.read_text() == "mine"
    assert "expected a new file" in chat.ask(f"/save {tmp_path}/none/file.json")
    assert "found no JSON" in chat.ask(f"/load {other}")
    other.write_text('[{"role": "nobody"}]')
    assert "messages[0].role" in chat.ask(f"/load {other}")
    assert "a new conversation" in chat.ask("/reset")
    chat.ask(f"/load {file}")
    assert asked(chat.ask("two"))[0] == "caf\u00e9"
    finish(chat)


# What the terminal shows


def test_reasoning_is_dim_and_nothing_after_it(chat: PseudoTerminal) -> None:
    """Each piece ends its dimming: nothing that ends the process leaves the terminal dim."""
    assert "\033[2mLet me \033[0m\033[2msee.\033[0m\n{" in chat.ask("one")
    finish(chat)


def test_calls_are_dim_and_the_beginning_of_their_results(chat: PseudoTerminal) -> None:
    shown = chat.ask("tool", until="\n> ")
    assert '\033[2mf: \033[0m\033[2m{"x": 1}\033[0m\n\033[2m-> y' in shown
    assert "y...\033[0m\nIt is y.\n" in shown and 300 < shown.count("y") < 500
    assert [message["content"] for message in saved_by(chat)][-2:] == ["y" * 1000, "It is y."]
    finish(chat)


def saved_by(chat: PseudoTerminal) -> list[dict[str, str]]:
    """The messages of the next question, but for the question."""
    shown = chat.ask("one", until="}\n> ")
    answer, _ = json.JSONDecoder().raw_decode(shown[shown.index('{"messages"') :].replace("\n", ""))
    return list(answer["messages"][:-1])


@pytest.mark.parametrize("term", ["dumb", None])
def test_terminals_without_codes(term: str | None) -> None:
    """They get no sign of life either, since that needs codes as well."""
    terminal = PseudoTerminal([*SPEAKER, "slow"], env={"TERM": term})
    assert terminal.end() == 0
    assert terminal.seen == "Let me see.\n"
    chat = PseudoTerminal(SPEAKER, env={"TERM": term})
    chat.wait_for("> ")
    assert asked(chat.ask("one")) == ["one"]
    finish(chat)
    assert "\033" not in chat.seen and not chat.brackets_pastes


def test_colors_that_are_not_wanted() -> None:
    terminal = PseudoTerminal([*SPEAKER, "hi"], env={"NO_COLOR": "1"})
    assert terminal.end() == 0 and "\033[2m" not in terminal.seen


@pytest.mark.parametrize("question", ["broken", "silent"])
def test_terminal_is_as_before_after_a_fault_or_the_end(question: str) -> None:
    terminal = PseudoTerminal(SPEAKER)
    terminal.wait_for("> ")
    terminal.send(f"{question}\r")
    terminal.wait_for("see.")
    if question == "silent":
        os.kill(terminal.process.pid, signal.SIGTERM)
    assert terminal.end() == (143 if question == "silent" else 1)
    assert terminal.seen.count("\033[2m") <= terminal.seen.count("\033[0m")


def test_end_by_a_signal_at_the_prompt_gives_back_the_terminal() -> None:
    """Else it would not echo what is typed into it next."""
    terminal = PseudoTerminal(SPEAKER)
    before = termios.tcgetattr(terminal._fd)
    terminal.wait_for("> ")
    time.sleep(SETTLING_SECONDS)
    os.kill(terminal.process.pid, signal.SIGTERM)
    assert terminal.process.wait(PATIENCE_SECONDS) == 143
    assert termios.tcgetattr(terminal._fd)[3] == before[3]
    terminal.end()


def test_sign_of_life_before_the_first_piece() -> None:
    terminal = PseudoTerminal([*SPEAKER, "slow", "--hide-analysis"])
    terminal.wait_for("reasoning, 1 s")
    terminal.wait_for("\033[K")
    assert terminal.end() == 0


def test_codes_that_a_model_says_are_not_obeyed() -> None:
    terminal = PseudoTerminal([*SPEAKER, "codes", "--hide-analysis"])
    assert terminal.end() == 0
    assert "\u241b[2mdim\u2407\ufffd31m\n" in terminal.seen and "\033" not in terminal.seen


def test_output_that_is_no_terminal_gets_answers_only(tmp_path: Path) -> None:
    """So it is in a chat too: greeting, prompts and reasoning are on the terminal."""
    with (tmp_path / "answers").open("wb") as file:
        terminal = PseudoTerminal(SPEAKER, stdout=file.fileno())
    terminal.wait_for("> ")
    terminal.ask("one")
    assert "Let me" in terminal.seen
    finish(terminal)
    assert asked((tmp_path / "answers").read_text()) == ["one"]
