"""Text to token ids and back: a frozen face of the `tokenizers` library, and its making from a GGUF file's tables."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from infopt.errors import CheckpointError, PromptError, nearest
from infopt.io.chat_template import ChatTemplate, no_template

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
CONTROL, USER_DEFINED = 3, 4  # GGUF's token types that are matched as a whole, before any splitting


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back. Tokenizers of one vocabulary are equal, wherever they came from.

    Args:
      backend: the `tokenizers.Tokenizer`; `backend.to_str()` is a tokenizer.json.
      eos_ids: tokens that end a text.
      template: how conversations are written, or None.
    """

    backend: tokenizers.Tokenizer
    eos_ids: tuple[int, ...] = ()
    template: ChatTemplate | None = None

    @staticmethod
    def from_file(path: Path, eos_ids: Sequence[int] = ()) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
          CheckpointError: it cannot be read, or is not one.
        """
        try:
            text = _read_text(path)
            _check_merges(text)
            backend = tokenizers.Tokenizer.from_str(text)
            for part in (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder):
                if part is not None:
                    _check_steps(json.loads(part.__getstate__()))
        except BaseException as error:  # the library raises bare Exceptions, and panics that are none
            if not _is_failure(error):
                raise
            raise CheckpointError(
                f"{path} is not a tokenizer that can be read.", why=str(error), fix="fetch the model again"
            ) from error
        # Some published files cut or pad what they encode, for training.
        backend.no_truncation()
        backend.no_padding()
        return Tokenizer(backend, tuple(eos_ids))

    @staticmethod
    def from_tables(
        tokens: Sequence[str],
        merges: Sequence[str],
        types: Sequence[int],
        pre: str,
        *,
        bos: int | None = None,
        eos_ids: Sequence[int] = (),
        where: str = "the file",
    ) -> Tokenizer:
        """Build a byte-level BPE (GPT-2's kind) from a GGUF file's tables.

        Args:
          tokens: the vocabulary, a token's place being its id, in GPT-2's byte alphabet.
          merges: pairs "left right", the earliest first.
          types: each token's GGUF type, or nothing; control and user-defined tokens are matched whole.
          pre: how text is split into words, by llama.cpp's name.
          bos: the token put before every text, or None.
          eos_ids: tokens that end a text.
          where: what error messages call the file.

        Raises:
          CheckpointError: the splitting is unknown, or the tables contradict each other.
        """
        if pre not in PRE_TOKENIZERS:
            raise CheckpointError(
                f"{where} splits its text by an unknown pre-tokenizer, {pre!r}.",
                why=f"another one gives tokens that it never saw. {nearest(pre, [*PRE_TOKENIZERS])}",
                fix="load the Hugging Face folder of this model, whose tokenizer.json says it all",
            )
        vocab = {token: i for i, token in enumerate(tokens)}
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        # Checked here because the library aborts with a Rust backtrace.
        for left, right in pairs:
            if left not in vocab or right not in vocab or left + right not in vocab:
                raise CheckpointError(
                    f"{where} joins {left!r} and {right!r} to a token outside its vocabulary.",
                    why="a merge must give a token.",
                    fix="fetch or convert the model again",
                )
        if len(vocab) != len(tokens) or (types and len(types) != len(tokens)):
            raise CheckpointError(
                f"{where} has a damaged vocabulary: {len(tokens)} tokens, {len(vocab)} of them "
                f"different, and {len(types)} types.",
                why="each token has one id and one type.",
                fix="fetch or convert the model again",
            )
        if bad := [i for i in (*([bos] if bos is not None else []), *eos_ids) if not 0 <= i < len(tokens)]:
            raise CheckpointError(
                f"{where} starts or ends a text with token {bad[0]}, but has {len(tokens)} tokens.",
                why="no such token exists.",
                fix="fetch or convert the model again",
            )
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab, pairs, continuing_subword_prefix="", end_of_word_suffix="", ignore_merges=pre in IGNORE_MERGES
            )
        )
        backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
        backend.decoder = decoders.ByteLevel()
        whole = [(token, kind) for token, kind in zip(tokens, types) if kind in (CONTROL, USER_DEFINED)]
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in whole if k == CONTROL])
        backend.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in whole if k == USER_DEFINED])
        if bos is not None:
            backend.post_processor = processors.TemplateProcessing(
                single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
            )
        return Tokenizer(backend, tuple(eos_ids))

    def chat(self, messages: Any, tools: Any = None, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, by the model's own template: what `encode(text, special=False)` makes tokens of.

        As in `transformers`, a special token that a message spells out (`<|im_end|>`) becomes that very token: whoever
        may write a message may end it, and begin another of any role. Who passes on what others write takes such
        texts out before.

        Args:
          messages: mappings with `role` and `content`, and what else the template reads.
          tools: JSON schemas of functions, for templates that know tools.
          add_generation_prompt: whether the text ends where the assistant's answer begins.

        Raises:
          PromptError: there is no template, or it refuses these messages, fails, or wants more than it may have.
        """
        if self.template is None:
            raise no_template()
        return self.template.render(messages, tools, add_generation_prompt)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with a start of text where the model was trained with one (unless `special` is False).

        As in the reference implementation, a byte that the vocabulary has no token for is dropped (SmolLM2 lacks some
        control characters).

        Raises:
          PromptError: not a text of Unicode characters.
        """
        try:
            return _working(self.backend.encode, text, add_special_tokens=special).ids
        except TypeError as error:
            what = "a lone surrogate" if isinstance(text, str) else f"a {type(text).__name__}"
            raise PromptError(
                f"a prompt must be Unicode text, not {what}.",
                why="a tokenizer reads the UTF-8 bytes of a text.",
                fix="text.encode('utf-8', 'replace').decode() replaces what is not",
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included; bytes that are not UTF-8 become U+FFFD.

        Raises:
          PromptError: an id is outside the vocabulary.
        """
        return _working(self.backend.decode, self._checked(ids), skip_special_tokens=False)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise PromptError(
                f"token {bad[0]} is outside the vocabulary.",
                why=f"it has {self.vocab_size} tokens, 0 to {self.vocab_size - 1}.",
                fix="decode with the tokenizer of the model that made the tokens",
            )
        return ids

    def stream(self) -> Stream:
        """A decoder for tokens that come one after another."""
        return Stream(self)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the vocabulary, ids and tokens: equal digests mean "the same vocabulary"."""
        vocab = sorted((i, token) for token, i in self.backend.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps(vocab).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, digest={self.digest[:8]})"


class Stream:
    """Decodes a growing list of tokens, and gives out text once nothing that follows can change it.

    All that `push` and `flush` returned, joined, is `tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Decoders treat the first token of a text apart, so new tokens are decoded behind some old ones. Both lists
        # start between two characters; `_shown` counts the characters given out of their joint text.
        self._context: list[int] = []
        self._pending: list[int] = []
        self._shown = 0
        self._certain = 0  # tokens of `_pending` before the run of bytes that it ends with

    def push(self, ids: Iterable[int]) -> str:
        """The text that the tokens `ids` have made certain; may be empty.

        Raises:
          PromptError: an id is outside the vocabulary; the stream then stands where it stood.
        """
        known = len(self._pending)
        self._pending += self._tokenizer._checked(ids)
        certain = len(self._pending)
        # A byte of a byte-fallback vocabulary: what follows decides how the whole run of bytes reads.
        while certain > known and BYTE_PIECE.fullmatch(
            self._tokenizer.backend.id_to_token(self._pending[certain - 1]) or ""
        ):
            certain -= 1
        self._certain = certain = certain if certain > known else self._certain
        text = self._tokenizer.decode(self._context + self._pending[:certain])
        whole = text.rstrip("\ufffd")  # a character whose last bytes are still to come, or a broken one
        new, self._shown = whole[self._shown :], max(self._shown, len(whole))
        if certain == len(self._pending) and whole == text and certain:
            self._context, self._pending, self._certain = self._pending, [], 0
            self._shown = len(self._tokenizer.decode(self._context))
        return new

    def flush(self) -> str:
        """What is left at the end of the text, complete or not; the stream then starts anew."""
        text = self._tokenizer.decode(self._context + self._pending)[self._shown :]
        self._context, self._pending, self._shown, self._certain = [], [], 0, 0
        return text


MOST_BYTES = 64 << 20
"""Bytes of a tokenizer.json; Gemma's, the largest in use, has 33 MB."""
MOST_STEPS = 64
MOST_GROWTH = 64
"""By how much normalising or decoding may lengthen a text: a hundred replacements of "a" by "aa" would never end."""


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than {MOST_BYTES:,}")
        return file.read(size).decode("utf-8")  # never `read(most)`: it takes that memory first


def _is_failure(error: BaseException) -> bool:
    """Whether an exception says that the library failed; its Rust code panics by one that is not an Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _working(call: Any, *args: Any, **kwargs: Any) -> Any:
    """The result of one of the library's calls; what it raises (but TypeError) is the tokenizer's fault."""
    try:
        return call(*args, **kwargs)
    except TypeError:
        raise
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise CheckpointError(
            "the model's tokenizer fails on this text.", why=f"{error}.", fix="fetch the model again"
        ) from error


def _check_merges(text: str) -> None:
    """Raise where a merge's second part is shorter than what is to be cut off it, on which the library panics."""
    if "merges" not in text or not re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', text):
        return
    model = json.loads(text).get("model", {})
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges", []):
        right = merge.partition(" ")[2] if isinstance(merge, str) else merge[1]
        if len(right.encode()) < len(prefix.encode()):
            raise ValueError(f"it merges {right!r:.60}, which does not begin with {prefix!r:.60}")


def _check_steps(plain: Any) -> None:
    """Raise where a part of a tokenizer does too much, or what the library would panic on."""
    growth, steps, stack = 1.0, 0, [plain]
    while stack:
        step = stack.pop()
        steps += 1
        kind = step.get("type")
        stack += [x for key in ("normalizers", "pretokenizers", "processors", "decoders") for x in step.get(key, ())]
        if kind == "Replace":
            replaced = len(step["pattern"].get("String", "")) or 1
            growth *= max(1.0, len(step["content"]) / replaced)
        elif kind == "Prepend":
            growth *= 1 + len(step["prepend"]) / MOST_GROWTH
        elif kind == "Strip" and max(step.get("start", 0), step.get("stop", 0)) > 1:
            raise ValueError("its decoder strips more than one character, so that no token's text is certain")
        elif kind == "TemplateProcessing":
            pieces = [*step["single"], *step["pair"]]
            growth *= max(1, sum("Sequence" in piece for piece in step["single"]))
            if lost := [x["SpecialToken"]["id"] for x in pieces if "SpecialToken" in x]:
                lost = [name for name in lost if name not in step["special_tokens"]]
            if lost:
                raise ValueError(f"it puts {lost[0]!r:.60} around a text, and does not say which token that is")
    if steps > MOST_STEPS or growth > MOST_GROWTH:
        raise ValueError(f"it lengthens a text {growth:.3g} times in {steps} steps")


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _llama3() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS = {"gpt-2": _byte_level, "smollm": _digits, "llama-bpe": _llama3}
IGNORE_MERGES = ("llama-bpe",)  # a word that is a token stays whole, even where no merges lead to it
