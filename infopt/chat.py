"""A conversation that keeps its cache: each turn reads in only what is new. `infopt chat` is this, in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from infopt import generation
from infopt.errors import InfoptError, PromptError
from infopt.generation import Generation, Held
from infopt.interrupts import heard_by
from infopt.io.chat_template import no_template
from infopt.model import Model, check_params, context_limit
from infopt.sampling import Sampling
from infopt.typing import Params

_SHORTEST = 512  # the least length of a state: growing it means to read all in again


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one answer took.

    Args:
      prompt_tokens: of the whole conversation, up to where the answer begins.
      prefilled: those that were read in for it; without a cache, all. The last is none of them: it is the first step
        of decoding.
      new_tokens: of the answer.
      finish: `"stop"`, `"length"`, or `"interrupted"`.
      seconds: in all, compiling included.
      generation: its figures; None where it was interrupted.
    """

    prompt_tokens: int
    prefilled: int
    new_tokens: int
    finish: str
    seconds: float
    generation: Generation | None

    def __str__(self) -> str:
        text = (
            f"prefilled {self.prefilled} of {self.prompt_tokens} tokens of history; "
            f"{self.new_tokens} new ones in {self.seconds:.1f} s; {self.finish}"
        )
        if self.generation is not None:
            text += f"; decode {self.generation.tokens_per_second:.1f} tokens/s"
            if self.generation.acceptance is not None:
                text += f", acceptance {self.generation.acceptance:.2f}"
        return text


class Chat:
    """A conversation with a model whose tokenizer has a chat template.

    The state is kept from turn to turn. A turn writes out the whole conversation by the template, rolls the state back
    to what it has in common with that, and reads in the rest. Where that cannot be (a ring has forgotten, the state is
    too short, the model is another one), all is read in again: the answer is the same.

    Args:
      model, params: a stack and its params.
      system: the system message, or None for what the template does without one.
      tools: JSON schemas of functions, for templates that know tools.
      max_new: tokens of an answer, at most.
      max_len: slots of the state; by default it grows as needed, up to the model's context.
      stop, stop_tokens: as in `generate`.
      sampling: as in `Sampling`, one value each.

    Attributes:
      messages: the conversation, `{"role": ..., "content": ...}` each; change it as you like between turns.
      turn: what the last answer took, or None.

    Raises:
      PromptError: the model has no chat template.
      SamplingError: an option out of range.
      ParamsError: params of another stack.

    >>> import infopt as ip
    >>> ip.Chat(ip.cache_kv()(ip.models.llama()), {})
    Traceback (most recent call last):
    infopt.errors.PromptError: this model has no chat template.
      ...
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        system: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_new: int = 512,
        max_len: int | None = None,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        **sampling: Any,
    ) -> None:
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self.turn: Turn | None = None
        self._tools, self._max_new, self._max_len = tools, max_new, max_len
        self._stop, self._stop_tokens, self._options = stop, stop_tokens, sampling
        self.switch(model, params)
        Sampling.of(1, **sampling)

    def switch(self, model: Model, params: Params) -> None:
        """Go on with another stack. The next turn reads the conversation in anew.

        Raises:
          PromptError: the model has no chat template.
          ParamsError: params of another stack.
        """
        if model.tokenizer is None or model.tokenizer.template is None:
            raise no_template()
        check_params(model.spec, params)
        self.model, self.params, self._held = model, params, Held()

    def send(self, text: str) -> Generator[str, None, None]:
        """The answer to a message, in pieces as they become certain. What is not asked for is not generated.

        Closing the iterator, or Ctrl-C, ends the answer: what there is of it stays in `messages`.

        Raises:
          PromptError: the template refuses the message, or the conversation is too long; it is as before then.
        """
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def edit(self, text: str) -> Generator[str, None, None]:
        """The answer to a message that takes the last one's place. As `send`.

        Raises:
          PromptError: there is no last message; or as `send`.
        """
        return self._answer([*self._before(), {"role": "user", "content": text}])

    def undo(self) -> None:
        """Take the last message back, and its answer.

        Raises:
          PromptError: there is none.
        """
        self.messages, self.turn = self._before(), None

    def reset(self) -> None:
        """Begin again, with the system message where there was one."""
        self.messages, self.turn = [m for m in self.messages[:1] if m["role"] == "system"], None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the messages to a file, as JSON: whole, or not at all.

        Raises:
          InfoptError: it cannot be written; what was there before is there still.
        """
        path = Path(path)
        fresh = path.with_name(f".{path.name[:100]}.saving-{os.getpid()}")
        try:
            fresh.write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            os.replace(fresh, path)
        except OSError as error:
            raise InfoptError(
                f"{path} could not be written.",
                why=error.strerror or str(error),
                fix="another file, in a folder that is there and yours to change; or free some space",
            ) from error
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)

    def _before(self) -> list[dict[str, Any]]:
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise PromptError(
                "there is no message to take back.", why="nothing was asked yet.", fix="send a message first"
            )
        return self.messages[: asked[-1]]

    def _room(self, prompt: int) -> tuple[int, int]:
        """How many tokens an answer may have, and the slots of a state that holds it."""
        spec = self.model.spec
        k = spec.program.k if spec.program else 0
        limit = min((n for n in (context_limit(spec), self._max_len) if n is not None), default=None)
        new = self._max_new if limit is None else min(self._max_new, limit - prompt - k)
        if new < 1:
            raise PromptError(
                f"the conversation has {prompt} tokens, and {limit} are all that fit, an answer included.",
                why="the state holds no more." if limit == self._max_len else "the model was not trained on more.",
                fix="undo() or reset() (/undo, /reset), or a stack with sliding_window(...)",
            )
        need, state = prompt + new + k, self._held.state
        if state is not None and state.max_len >= need:
            return new, state.max_len
        length = _SHORTEST
        while length < need:
            length *= 2
        return new, length if limit is None else self._max_len or min(length, limit)

    def _answer(self, messages: list[dict[str, Any]]) -> Generator[str, None, None]:
        began = time.perf_counter()
        tokenizer = self.model.tokenizer
        ids = tokenizer.encode(tokenizer.chat(messages, self._tools), special=False)
        new, length = self._room(len(ids))
        run = generation.answer(
            self.model,
            self.params,
            ids,
            self._held,
            max_new=new,
            max_len=length,
            stop=self._stop,
            stop_tokens=self._stop_tokens,
            **self._options,
        )
        answer = {"role": "assistant", "content": ""}
        self.messages = [*copy.deepcopy(messages), answer]
        out, count = None, 0
        try:
            while True:
                try:
                    chunk = next(run)
                except StopIteration as end:
                    out = end.value
                    return
                count += len(chunk.tokens)
                answer["content"] += chunk.text
                yield chunk.text
        finally:
            finish, seconds = "interrupted" if out is None else out.finish, time.perf_counter() - began
            read = (
                self._held.prefilled if self.model.spec.cache else len(ids) - 1
            )  # without a cache, each step reads all
            self.turn = Turn(len(ids), read, count, finish, seconds, out)


# --------------------------------------------------------------------------------------------------- the command line

HELP = """\
/undo         take the last message and its answer back
/edit TEXT    put TEXT in the last message's place, and answer it
/reset        begin again, with the same system message
/stack        the model and its transforms
/stack TEXT   go on with another stack; none for the bare model
/stats        what the last answer took, and how much of the history was read in for it
/save FILE    write the messages as JSON
/help         this
//TEXT        a message that begins with /
Ctrl-C stops an answer and keeps what there is of it. Ctrl-D ends."""


def main(args: argparse.Namespace) -> int:
    """`infopt chat`: lines from standard input, answers to standard output, everything else to standard error."""
    from infopt.io import load
    from infopt.transforms import stack_option

    def stacked(stack: Callable[[Model], Model]) -> tuple[Model, Params]:
        model = stack(base)
        return model, base_params if model is base else model.convert(base_params)

    stack = stack_option(args.stack)
    base, base_params = load(args.model, dtype=args.dtype)
    chat = Chat(
        *stacked(stack),
        args.system,
        max_new=args.max_new,
        max_len=args.max_len,
        stop=tuple(args.stop),
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() then edits lines, and remembers them)
        print(f"{args.model}: /help for commands, Ctrl-D to end", file=sys.stderr)
    code = 0
    while True:
        try:
            line = input("> " if terminal else "").strip()
            if line:
                _obey(chat, line, lambda text: stacked(stack_option(text)))
        except EOFError:
            if terminal:
                print()
            return code
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(file=sys.stderr)
        except (InfoptError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            sys.stdout.flush()
            print(f"infopt: {error.one_line if isinstance(error, InfoptError) else error}", file=sys.stderr)
            code = code if terminal else 2  # a script hears of it; who sees it goes on


def _obey(chat: Chat, line: str, stacked: Callable[[str], tuple[Model, Params]]) -> None:
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if not line.startswith("/") or line.startswith("//"):
        _show(chat.send(line[line.startswith("//") :]))
    elif word == "/help":
        print(HELP)
    elif word == "/undo":
        chat.undo()
    elif word == "/reset":
        chat.reset()
    elif word == "/stats":
        print("nothing was asked yet" if chat.turn is None else chat.turn)
        print(chat.model)
    elif line == "/stack":
        print(chat.model)
    elif word in ("/edit", "/save", "/stack"):
        if not rest:
            raise InfoptError(f"{word} stands alone.", why="it needs something after it.", fix="see /help")
        if word == "/edit":
            _show(chat.edit(rest))
        elif word == "/save":
            chat.save(rest)
            print(f"{len(chat.messages)} messages are in {rest}")
        else:
            chat.switch(*stacked(rest))
    else:
        raise InfoptError(f"there is no {word}.", why="a line that begins with / is a command.", fix="see /help")


def _show(pieces: Generator[str, None, None]) -> None:
    """Print an answer as it comes. The first Ctrl-C ends it between two steps, a second one within a step."""
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    with heard_by(hear), contextlib.closing(pieces):
        for piece in pieces:
            print(piece, end="", flush=True)
            if heard:
                break
    print(flush=True)
