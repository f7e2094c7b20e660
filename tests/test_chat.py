"""Chat: what a turn reads in, that a kept state changes no token, editing, interruption; and the command."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models

import infopt as ip
from infopt import cli
from infopt.errors import InfoptError, PromptError, SamplingError
from infopt.io.chat_template import ChatTemplate
from infopt.io.tokenizer import Tokenizer
from infopt.model import Weights
from infopt.reference import reference
from infopt.spec import oracle

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse me' %}{{ raise_exception('no') }}{% endif %}"
    "<{{ m.role[0] }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
SYSTEM = "Be brief."


def letters(template: str | None = TEMPLATE) -> Tokenizer:
    """A token for each of 256 letters, so that any tokens are those of their text; and a few that are special."""
    alphabet = [chr(c) for c in [*range(32, 127), *range(0x4E00, 0x4E00 + 161)]]
    backend = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(alphabet)}, [], continuing_subword_prefix="", end_of_word_suffix="")
    )
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<end>", "<s>", "<u>", "<a>")])
    return Tokenizer(backend, (256,), None if template is None else ChatTemplate(template))


BARE = dataclasses.replace(
    ip.models.llama(layers=2, dim=32, heads=2, kv_heads=1, head_dim=8, mlp=32, vocab=260, context=1024, tied=False),
    tokenizer=letters(),
)
PARAMS = BARE.init(jax.random.key(0))
SPECULATIVE = "speculative(draft=self_draft(quantize(bits=8)), k=3)"
STACKS = {
    "linear": "cache_kv()",
    "ring": "sliding_window(16, sinks=2) | cache_kv()",
    "paged": "cache_kv() | paged(16)",
    "speculative": f"cache_kv() | {SPECULATIVE}",
    "speculative ring": f"sliding_window(16, sinks=2) | cache_kv() | {SPECULATIVE}",
    "int8": "cache_kv(bits=8)",
}
NEW = 12


def stacked(text: str) -> tuple[ip.Model, Any]:
    model = ip.parse_stack(text)(BARE)
    return model, model.convert(PARAMS)


def ids(messages: list[dict[str, Any]], tokenizer: Any = BARE.tokenizer) -> list[int]:
    return tokenizer.encode(tokenizer.chat(messages), special=False)


def fresh(model: ip.Model, params: Any, messages: list[dict[str, Any]], **options: Any) -> ip.Generation:
    """What `generate` answers to the whole conversation but its last message, which is the answer."""
    return ip.generate(model, params, ids(messages[:-1]), max_new=NEW, **options)


def say(chat: ip.Chat, text: str) -> str:
    return "".join(chat.send(text))


def turn(chat: ip.Chat) -> Any:
    assert chat.turn is not None
    return chat.turn


def common(one: list[int], two: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))


# --------------------------------------------------------------------------------------------------- what is read anew


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}], ids=str)
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_a_turn_reads_only_what_is_new_and_answers_as_a_fresh_generate(stack: str, options: dict[str, Any]) -> None:
    model, params = stacked(stack)
    chat = ip.Chat(model, params, SYSTEM, max_new=NEW, **options)
    before: list[int] = []
    for n, text in enumerate(["Hello there", "And then? Tell me more of it", "x"]):
        answer = say(chat, text)
        out = fresh(model, params, chat.messages, **options)
        assert answer == out.text == chat.messages[-1]["content"]
        prompt = ids(chat.messages[:-1])
        assert (turn(chat).prompt_tokens, turn(chat).new_tokens) == (len(prompt), out.new_tokens)
        assert turn(chat).prefilled == len(prompt) - 1 - common(before, prompt[:-1])
        assert turn(chat).prefilled < len(text) + NEW + 8 or n == 0
        before = [*prompt, *out.tokens][:-1]


def test_a_ring_goes_round_and_what_it_has_forgotten_is_read_again() -> None:
    model, params = stacked(STACKS["ring"])
    chat = ip.Chat(model, params, max_new=NEW)
    for text in ("first", "y" * 200, "third"):
        say(chat, text)
        assert chat.messages[-1]["content"] == fresh(model, params, chat.messages).text
    assert turn(chat).prefilled < 40  # the ring has gone round, and is still of use
    chat.undo()
    chat.undo()
    say(chat, "other")  # beyond what the ring looks ahead
    assert turn(chat).prefilled == turn(chat).prompt_tokens - 1
    assert chat.messages[-1]["content"] == fresh(model, params, chat.messages).text


WRAPPING = {
    "ring": "sliding_window(16, sinks=2) | cache_kv()",
    "int8": "sliding_window(16, sinks=2) | cache_kv(bits=8)",
    "paged": "sliding_window(16) | cache_kv() | paged(8)",
    "one layer": "sliding_window(16, layers=[1]) | cache_kv()",
    "speculative": f"sliding_window(16, sinks=2) | cache_kv() | {SPECULATIVE}",
}


LENGTH = 768
"""Of the state, from the first turn on: one that grows begins a ring anew."""


def rounds(chat: ip.Chat) -> float:
    """How often the tokens of the conversation go round in the shortest of the state's rings."""
    state = chat._held.state
    assert state is not None
    layouts = state.layouts[0] if chat.model.spec.program else state.layouts
    return turn(chat).prompt_tokens / min(layout.slots for layout in layouts if layout.lookahead is not None)


def answered_as_recomputed(chat: ip.Chat) -> None:
    """The last answer's tokens and their log-probabilities are the oracle's: in numpy, no cache, all computed anew."""
    spec, params, out = chat.model.spec, chat.params, turn(chat).generation
    prompt, answer = ids(chat.messages[:-1]), list(out.tokens)
    if spec.program is not None:
        spec, params = spec.replace(program=None), params["target"]
    logits = reference(oracle(spec), Weights.of(spec, params), np.asarray(prompt + answer))[len(prompt) - 1 : -1]
    assert answer == logits.argmax(-1).tolist()
    logprobs = logits.max(-1) - np.log(np.exp(logits).sum(-1))
    # A key on a rounding's edge may go to the other side.
    np.testing.assert_allclose(out.logprobs, logprobs, atol=(1e-4 if spec.kv is None else 3e-2) * logits.std(), rtol=0)


@pytest.mark.parametrize("stack", WRAPPING.values(), ids=WRAPPING)
def test_rings_go_round_over_several_turns_and_answer_as_the_oracle_does(stack: str) -> None:
    chat = ip.Chat(*stacked(stack), SYSTEM, max_new=NEW, max_len=LENGTH, logprobs=True)
    for n, more in enumerate((7, 7, 7, 14)):
        text = f"{n} is the number of this question" + " and so on" * more
        say(chat, text)
        answered_as_recomputed(chat)
        assert turn(chat).prefilled < len(text) + 2 * NEW  # each turn goes on with the ring of the one before
    assert rounds(chat) > 3
    chat.undo()
    say(chat, "another end")
    assert turn(chat).prefilled == turn(chat).prompt_tokens - 1  # more than a ring can take back
    answered_as_recomputed(chat)


SWITCHED = ("int8", "speculative", "one layer")


@pytest.mark.parametrize("after", [*map(WRAPPING.get, SWITCHED), "cache_kv()"], ids=[*SWITCHED, "no window"])
def test_a_switch_after_rings_have_gone_round_answers_as_the_oracle_does(after: str) -> None:
    chat = ip.Chat(*stacked(WRAPPING["ring"]), max_new=NEW, max_len=LENGTH, logprobs=True)
    for n in range(3):
        say(chat, f"{n} is the number of this question" + " and so on" * 9)
    assert rounds(chat) > 2
    for stack, text in ((after, "And now? " * 6), (after, "Go on"), (WRAPPING["ring"], "And back? " * 6)):
        anew = chat.model != stacked(stack)[0]
        if anew:
            chat.switch(*stacked(stack))
        say(chat, text)
        assert (turn(chat).prefilled == turn(chat).prompt_tokens - 1) == anew
        answered_as_recomputed(chat)


def test_a_state_grows_with_the_conversation() -> None:
    model, params = stacked("cache_kv()")
    chat = ip.Chat(model, params, max_new=NEW)
    say(chat, "a" * 300)
    say(chat, "b" * 300)
    assert turn(chat).prefilled == turn(chat).prompt_tokens - 1  # it did not fit
    say(chat, "c" * 100)
    assert turn(chat).prefilled < 130
    assert chat.messages[-1]["content"] == fresh(model, params, chat.messages).text


def test_without_a_cache_all_is_read_each_time() -> None:
    chat = ip.Chat(BARE, PARAMS, max_new=3)
    say(chat, "a")
    say(chat, "b")
    assert turn(chat).prefilled == turn(chat).prompt_tokens - 1
    assert chat.messages[-1]["content"] == ip.generate(BARE, PARAMS, ids(chat.messages[:-1]), max_new=3).text


def test_a_switch_of_stacks_goes_on_with_the_conversation() -> None:
    chat = ip.Chat(*stacked("cache_kv()"), max_new=NEW)
    say(chat, "Hello")
    chat.switch(*stacked("quantize(bits=8) | cache_kv()"))
    say(chat, "More")
    assert turn(chat).prefilled == turn(chat).prompt_tokens - 1
    assert len(chat.messages) == 4
    assert chat.messages[-1]["content"] == fresh(chat.model, chat.params, chat.messages).text


# -------------------------------------------------------------------------------------------------- editing the history


def test_undo_edit_and_reset_keep_what_is_left_in_the_cache() -> None:
    chat = ip.Chat(*stacked("cache_kv()"), SYSTEM, max_new=NEW)
    say(chat, "One")
    after_one = list(chat.messages)
    say(chat, "Two")
    "".join(chat.edit("Two and a half"))
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["One", "Two and a half"]
    assert turn(chat).prefilled <= len(" and a half") + 2
    assert chat.messages[-1]["content"] == fresh(chat.model, chat.params, chat.messages).text
    chat.undo()
    assert chat.messages == after_one
    chat.reset()
    assert chat.messages == [{"role": "system", "content": SYSTEM}]
    with pytest.raises(PromptError, match="no message to take back"):
        chat.undo()
    with pytest.raises(PromptError, match="no message to take back"):
        next(chat.edit("x"))


def test_messages_can_be_changed_by_hand() -> None:
    chat = ip.Chat(*stacked("cache_kv()"), max_new=NEW)
    say(chat, "One")
    chat.messages[1]["content"] = "something else"
    say(chat, "Two")
    assert chat.messages[1]["content"] == "something else"
    assert chat.messages[-1]["content"] == fresh(chat.model, chat.params, chat.messages).text


def test_messages_are_saved_as_json(tmp_path: Path) -> None:
    chat = ip.Chat(*stacked("cache_kv()"), "é🎉", max_new=3)
    say(chat, "一")
    chat.save(tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text(encoding="utf-8")) == chat.messages


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("place", ["write_text", "replace"])
def test_messages_that_cannot_be_saved_leave_the_file_as_it_was(
    place: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ip.Chat(*stacked("cache_kv()"), SYSTEM)
    chat.save(tmp_path / "m.json")
    before, write = (tmp_path / "m.json").read_bytes(), Path.write_text

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        if place == "write_text":
            write(path, "half")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path if place == "write_text" else os, place, refuse)
    chat.messages.append({"role": "user", "content": "more"})
    with pytest.raises(InfoptError, match="could not be written") as caught:
        chat.save(tmp_path / "m.json")
    assert caught.value.why == os.strerror(number)
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]
    assert (tmp_path / "m.json").read_bytes() == before


# --------------------------------------------------------------------------------------------------------- interruption


def test_an_answer_that_is_closed_is_kept_as_far_as_it_came() -> None:
    chat = ip.Chat(*stacked("cache_kv()"), max_new=64)
    pieces = chat.send("Hello")
    first = next(pieces) + next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first}
    assert turn(chat).finish == "interrupted" and 0 < turn(chat).new_tokens < 64
    say(chat, "Go on")
    assert turn(chat).prefilled < len("Go on") + 12
    assert len(chat.messages) == 4


def test_ctrl_c_within_a_step_loses_the_cache_but_not_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    from infopt import generation

    chat = ip.Chat(*stacked("cache_kv()"), max_new=NEW)
    say(chat, "Hello")
    prefill, _ = generation.compiled(chat.model.spec)

    def cut(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "compiled", lambda spec: (prefill, rounds_cut))
    rounds_cut = type("Cut", (), {"seconds": 0.0, "__call__": lambda self, *args: cut(*args)})()
    with pytest.raises(KeyboardInterrupt):
        say(chat, "More")
    monkeypatch.undo()
    assert chat.messages[-2:] == [{"role": "user", "content": "More"}, {"role": "assistant", "content": ""}]
    say(chat, "Again")
    assert turn(chat).prefilled == turn(chat).prompt_tokens - 1
    assert chat.messages[-1]["content"] == fresh(chat.model, chat.params, chat.messages).text


# -------------------------------------------------------------------------------------------------------------- refused


def test_what_is_refused_leaves_the_conversation_as_it_was() -> None:
    chat = ip.Chat(*stacked("cache_kv()"), max_new=NEW)
    say(chat, "Hello")
    before = list(chat.messages)
    with pytest.raises(PromptError, match="refuses these messages"):
        say(chat, "refuse me")
    with pytest.raises(PromptError, match=r"1024 are all that fit[\s\S]*undo"):
        say(chat, "x" * 2000)
    assert chat.messages == before
    say(chat, "Still here")
    assert turn(chat).prefilled < 30


def test_an_answer_takes_what_room_there_is() -> None:
    chat = ip.Chat(*stacked("cache_kv()"), max_len=40, max_new=NEW, stop_tokens=[])
    say(chat, "x" * 30)
    assert turn(chat).new_tokens == 40 - turn(chat).prompt_tokens < NEW
    with pytest.raises(PromptError, match="all that fit"):
        say(chat, "x")


@pytest.mark.parametrize("tokenizer", [None, letters(None)], ids=["no tokenizer", "no template"])
def test_a_model_without_a_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(PromptError, match="no chat template"):
        ip.Chat(dataclasses.replace(BARE, tokenizer=tokenizer), PARAMS)


def test_a_sampling_option_out_of_range_is_refused_at_once() -> None:
    with pytest.raises(SamplingError):
        ip.Chat(BARE, PARAMS, temperature=-1.0)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `infopt chat` on lines of input; its exit code, standard output and standard error."""
    monkeypatch.setenv("INFOPT_COMPILE_CACHE", "0")
    monkeypatch.setattr("infopt.io.load", lambda name, dtype: (BARE, PARAMS))

    def run(*lines: str, arguments: tuple[str, ...] = ()) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code = cli.main(["chat", "m", "-n", "8", *arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def test_lines_are_answered_and_stats_say_what_was_read(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    code, out, err = talk("Hello", "/stats", "//x", "/stats", f"/save {path}", arguments=("--system", SYSTEM))
    assert (code, err) == (0, [])
    messages = json.loads(path.read_text())
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "/x"
    stats = [line for line in out if line.startswith("prefilled")]
    whole = len(ids(messages[:2]))
    assert stats[0].startswith(f"prefilled {whole - 1} of {whole} tokens of history; 8 new ones in ")
    read, total = int(stats[1].split()[1]), int(stats[1].split()[3])
    assert total == len(ids(messages[:4])) and read < 18 < whole


def test_commands_edit_the_history_and_change_the_stack(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    lines = (
        "One",
        "Two",
        "/undo",
        "/edit Three",
        "/stack quantize(bits=8) | cache_kv()",
        "Four",
        "/stats",
        f"/save {path}",
    )
    code, out, err = talk(*lines)
    assert (code, err) == (0, [])
    assert [m["content"] for m in json.loads(path.read_text())][::2] == ["Three", "Four"]
    assert any("quantize(bits=8) | cache_kv()" in line for line in out)
    code, out, err = talk("One", "/reset", "/stats", f"/save {path}", "/help", "/stack none", "/stack")
    assert code == 0 and json.loads(path.read_text()) == []
    assert f"0 messages are in {path}" in out
    assert any(line.startswith("/undo") for line in out) and any("| (bare)" in line for line in out)


@pytest.mark.parametrize(
    "line, said",
    [
        ("/nothing", "there is no /nothing"),
        ("/edit", "stands alone"),
        ("/edit x", "no message to take back"),
        ("/undo", "no message to take back"),
        ("/stack cash_kv()", "cache_kv"),
        ("/save /nowhere/at/all.json", "No such file"),
        ("refuse me", "refuses these messages"),
        ("x" * 2000, "all that fit"),
    ],
)
def test_a_mistake_costs_a_line_and_the_session_goes_on(line: str, said: str, talk: Any) -> None:
    code, out, err = talk(line, "Hello", "/stats")
    assert code == 2 and len(err) == 1 and said in err[0] and err[0].startswith("infopt: ")
    assert any(text.startswith("prefilled") for text in out)


@pytest.mark.parametrize(
    "stack", ["quantize(bits=8) | cache_kv(bits=8)", f"cache_kv() | {SPECULATIVE}", "quantize(bits=8)"]
)
def test_a_saved_stack_chats_as_it_was_saved_and_gets_a_cache_where_it_has_none(
    stack: str, talk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infopt.io import saved

    ip.save(tmp_path / "stack", *stacked(stack))
    monkeypatch.setattr("infopt.io.load", lambda name, dtype: saved.load(tmp_path / "stack", dtype))
    code, out, err = talk("Hello", "/stats", "/stack none", "/stats")
    assert (code, err) == (0, [])
    told = [line.partition(" | ")[2] for line in out if line.startswith("llama")]
    assert told == [stack if "cache_kv" in stack else f"{stack} | cache_kv()", stack]
    code, _, err = talk("Hello", arguments=("--stack", "cache_kv()"))  # asked for, it is not left out
    assert (code, len(err)) == ((2, 1) if "cache_kv" in stack else (0, 0))


def test_a_wrong_stack_is_told_before_the_model_is_read(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infopt.io.load", lambda name, dtype: pytest.fail("read"))
    code, _, err = talk("Hello", arguments=("--stack", "cash_kv()"))
    assert code == 2 and len(err) == 1


def test_ctrl_c_ends_the_answer_and_the_session_goes_on(talk: Any, tmp_path: Path, monkeypatch: Any) -> None:
    send = ip.Chat.send

    def interrupted(self: ip.Chat, text: str) -> Iterator[str]:
        pieces = send(self, text)
        try:
            for piece in pieces:
                if text == "long":
                    os.kill(os.getpid(), signal.SIGINT)
                yield piece
        finally:
            pieces.close()

    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(ip.Chat, "send", interrupted)
    path, before = tmp_path / "m.json", signal.getsignal(signal.SIGINT)
    code, out, err = talk("long", "/stats", "more", "/stats", f"/save {path}")
    assert (code, err) == (0, [])
    stats = [line for line in out if line.startswith("prefilled")]
    assert "interrupted" in stats[0] and "interrupted" not in stats[1]
    assert [m["content"] for m in json.loads(path.read_text())][::2] == ["long", "more"]
    assert signal.getsignal(signal.SIGINT) is before


def test_help_of_chat_answers_without_jax() -> None:
    code = "import sys; from infopt import cli\ntry: cli.main(['chat', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'jax' not in sys.modules and 'jinja2' not in sys.modules"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "--stack" in done.stdout, done.stderr
