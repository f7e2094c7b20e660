"""Text to token ids and back: a frozen face of the `tokenizers` library, and its making from a GGUF file's tables."""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from infopt.errors import CheckpointError, PromptError, nearest
from infopt.io.chat_template import ChatTemplate, no_template

BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "\u2581"  # how SentencePiece writes a space
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # GGUF's token types that are matched as a whole, before any splitting
UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")  # Phi-3's special tokens after which blanks stay
LONGEST_PIECE = 512  # SentencePiece trains none that is longer


@dataclasses.dataclass(frozen=True)
class Splitting:
    """How a family of byte-level vocabularies cuts a text into words, within which alone tokens are merged.

    Args:
      words: regular expressions, each cutting further what the one before left; none: GPT-2's words.
      digits: whether digits are cut off one by one, before GPT-2's words.
      whole: whether a word that is a token stays whole, even where no merges lead to it.
      bos: whether a file that does not say so puts a token before every text.
      nfc: whether a text is composed first (Unicode's NFC).
    """

    words: tuple[str, ...] = ()
    digits: bool = False
    whole: bool = False
    bos: bool = False
    nfc: bool = False

    def pre_tokenizer(self, prefix: bool) -> Any:
        if not self.words:
            by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True)
            digits = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
            return pre_tokenizers.Sequence([*digits, by_bytes]) if digits else by_bytes
        cuts = [pre_tokenizers.Split(Regex(words), behavior="isolated") for words in self.words]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# OpenAI's cl100k, with numbers of up to three digits or of one.
_THREES = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_ONES = _THREES.replace("{1,3}", "")
# OpenAI's o200k: a word's capitals come first. Tekken has it without English endings, and with single digits.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{first}{_LOWER}{second}" for first, second in ("*+", "+*")]
_MARKS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_MARKS}"
_O200K = rf"{_CASED[0]}{_ENDINGS}?|{_CASED[1]}{_ENDINGS}?|\p{{N}}{{1,3}}|{_MARKS}"
_LLAMA3 = Splitting((_THREES,), whole=True, bos=True)
SPLITTINGS = {
    "default": Splitting((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}")),
    "gpt-2": Splitting(),
    "smollm": Splitting(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": Splitting((_THREES,), whole=True),  # Llama 3's vocabulary without its start: SmolLM3's, too
    "dbrx": Splitting((_THREES,)),
    # Qwen's own tokenizer composes; llama.cpp does not, nor here what has only its words.
    "qwen2": Splitting((_ONES,), nfc=True),
    "deepseek-r1-qwen": Splitting((_ONES,)),
    "tekken": Splitting((_TEKKEN,), whole=True, bos=True),
    "gpt-4o": Splitting((_O200K,)),
    "deepseek-coder": Splitting(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
}
"""By llama.cpp's name of it."""


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
            text = read_text(path, MOST_BYTES)
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
        prefix: bool = False,
        bos: int | None = None,
        eos: int | None = None,
        eos_ids: Sequence[int] = (),
        where: str = "the file",
    ) -> Tokenizer:
        """Build a byte-level BPE (GPT-2's kind) from a GGUF file's tables.

        Args:
          tokens: the vocabulary, a token's place being its id, in GPT-2's byte alphabet.
          merges: pairs "left right", the earliest first.
          types: each token's GGUF type, or nothing; control and user-defined tokens are matched whole.
          pre: how text is split into words, by llama.cpp's name: a key of `SPLITTINGS`.
          prefix: whether a text begins with a space, even if it does not. As in `transformers`, GPT-2's words alone
            heed it.
          bos: the token put before every text, or None.
          eos: the token put after every text, or None.
          eos_ids: tokens that end a text.
          where: what error messages call the file.

        Raises:
          CheckpointError: the splitting is unknown, or the tables contradict each other.
        """
        if pre not in SPLITTINGS:
            raise CheckpointError(
                f"{where} splits its text by an unknown pre-tokenizer, {pre!r}.",
                why=f"another one gives tokens that it never saw. {nearest(pre, [*SPLITTINGS])}",
                fix="load the Hugging Face folder of this model, whose tokenizer.json says it all",
            )
        splitting = SPLITTINGS[pre]
        vocab = _vocabulary(tokens, types, [bos, eos, *eos_ids], where)
        pairs = [(left, right) for left, _, right in (str(merge).partition(" ") for merge in merges)]
        # Checked here because the library aborts with a Rust backtrace.
        for left, right in pairs:
            if left not in vocab or right not in vocab or left + right not in vocab:
                raise CheckpointError(
                    f"{where} joins {left!r:.60} and {right!r:.60} to a token outside its vocabulary.",
                    why="a merge must give a token.",
                    fix="fetch or convert the model again",
                )
        backend = tokenizers.Tokenizer(
            models.BPE(vocab, pairs, continuing_subword_prefix="", end_of_word_suffix="", ignore_merges=splitting.whole)
        )
        if splitting.nfc:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = splitting.pre_tokenizer(prefix)
        backend.decoder = decoders.ByteLevel()
        kinds = dict(zip(tokens, types))
        _match_whole(backend, [t for t in tokens if kinds.get(t) == CONTROL], special=True)
        _match_whole(backend, [t for t in tokens if kinds.get(t) == USER_DEFINED], special=False)
        _begin_and_end(backend, tokens, bos, eos)
        return Tokenizer(backend, tuple(eos_ids))

    @staticmethod
    def from_pieces(
        tokens: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        *,
        prefix: bool = True,
        strip: bool = False,
        unknown: int | None = None,
        bos: int | None = None,
        eos: int | None = None,
        eos_ids: Sequence[int] = (),
        where: str = "the file",
    ) -> Tokenizer:
        """Build a SentencePiece BPE (Llama 2's and Gemma's kind) from a GGUF file's tables.

        Spaces are written as low lines, the pair whose joint piece has the highest score is merged first, and what has
        no piece becomes bytes, as `sentencepiece` does it. As in the published tokenizer.json of Llama 2, TinyLlama and
        Phi-3 (and in llama.cpp, but not in what `transformers` 5 makes of `LlamaTokenizer`), a space is put before each
        stretch of text: at its start, even before another space, and after a special token.

        Args:
          tokens: the vocabulary, a token's place being its id.
          scores: each token's score.
          types: each token's GGUF type, or nothing; control, unknown and user-defined tokens are matched whole.
          prefix: whether a space is put before a text; Gemma has none.
          strip: whether blanks after a special token are dropped, as for Phi-3.
          unknown: the token of what has none; needed only by a vocabulary without the 256 bytes.
          bos: the token put before every text, or None.
          eos: the token put after every text, or None.
          eos_ids: tokens that end a text.
          where: what error messages call the file.

        Raises:
          CheckpointError: the tables contradict each other, or are not SentencePiece's.

        >>> words = ["<unk>", "<s>", SPACE, "h", "i", "hi", SPACE + "hi"]
        >>> made = Tokenizer.from_pieces(words, [0, 0, -3, -4, -5, -1, -2], [2, 3, 1, 1, 1, 1, 1], unknown=0, bos=1)
        >>> made.encode("hi hi")
        [1, 6, 6]
        """
        types = types or [1] * len(tokens)
        _vocabulary(tokens, types, [unknown, bos, eos, *eos_ids], where)
        damage = [s for s in scores if not isinstance(s, int | float) or not math.isfinite(s)]
        if len(scores) != len(tokens) or damage:
            raise CheckpointError(
                f"{where} has damaged scores: {len(scores)} for {len(tokens)} tokens"
                + (f", one of them {damage[0]!r:.40}." if damage else "."),
                why="each token has a score, which says what is merged first.",
                fix="fetch or convert the model again",
            )
        tokens = _respelled(tokens, types)
        vocab = {token: i for i, token in enumerate(tokens)}
        missing = [piece for piece in BYTE_PIECES if piece not in vocab]
        if 0 < len(missing) < 256 or (missing and unknown is None):
            raise CheckpointError(
                f"{where} has no token for {missing[0] if len(missing) < 256 else 'unknown characters'}.",
                why="what has no piece becomes bytes, for which there must be all 256 tokens, or else an unknown one.",
                fix="fetch or convert the model again",
            )
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab,
                _merges(tokens, scores, types, where),
                continuing_subword_prefix="",
                end_of_word_suffix="",
                unk_token=None if unknown is None else tokens[unknown],
                fuse_unk=True,
                byte_fallback=not missing,
            )
        )
        low_lines = normalizers.Replace(" ", SPACE)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), low_lines]) if prefix else low_lines
        text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*text, decoders.Strip(" ", 1, 0)] if prefix else text)
        special = [t for t, kind in zip(tokens, types) if kind in (CONTROL, UNKNOWN)]
        plain = [t for t, kind in zip(tokens, types) if kind == USER_DEFINED and t.strip(SPACE)]
        _match_whole(backend, special, special=True, strip=strip)
        _match_whole(backend, plain, special=False, strip=strip)
        _begin_and_end(backend, tokens, bos, eos)
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

    def stream(self, after: Sequence[int] = ()) -> Stream:
        """A decoder for tokens that come one after another.

        Args:
          after: tokens that they follow, whose text is not given out. A token's text may depend on them: Llama's
            vocabulary spells words with the space before them, which the first of a text has not.
        """
        return Stream(self, after)

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


_CONTEXT = 8  # tokens: more than the longest character has bytes


class Stream:
    """Decodes a growing list of tokens, and gives out text once nothing that follows can change it.

    All that `push` and `flush` returned, joined, is `tokenizer.decode` of all tokens, less what `after` decodes to.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Decoders treat the first token of a text apart, so new tokens are decoded behind some old ones. Both lists
        # start between two characters; `_shown` counts the characters given out of their joint text.
        self._context: list[int] = [i for i in after[-_CONTEXT:] if i < tokenizer.vocab_size]
        self._pending: list[int] = []
        self._shown = len(tokenizer.decode(self._context).rstrip("\ufffd"))
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


def read_text(path: Path, most: int) -> str:
    """A text file of at most so many bytes; raises ValueError where it has more, or is not UTF-8."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size:,} bytes, more than {most:,}")
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


# ------------------------------------------------------------------------------------------------ a GGUF file's tables


def _vocabulary(tokens: Sequence[str], types: Sequence[int], ids: Sequence[int | None], where: str) -> dict[str, int]:
    """Each token's id, once the tables are known to fit each other."""
    if bad := [token for token in tokens if not isinstance(token, str)]:
        raise CheckpointError(
            f"{where} has a damaged vocabulary: its token {bad[0]!r:.40} is not text.",
            why="a token is a piece of text.",
            fix="fetch or convert the model again",
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or (types and len(types) != len(tokens)):
        raise CheckpointError(
            f"{where} has a damaged vocabulary: {len(tokens)} tokens, {len(vocab)} of them "
            f"different, and {len(types)} types.",
            why="each token has one id and one type.",
            fix="fetch or convert the model again",
        )
    if outside := [i for i in ids if i is not None and not (isinstance(i, int) and 0 <= i < len(tokens))]:
        raise CheckpointError(
            f"{where} starts or ends a text with token {outside[0]!r:.40}, or has it for what is unknown, but has "
            f"{len(tokens)} tokens.",
            why="no such token exists.",
            fix="fetch or convert the model again",
        )
    return vocab


def _match_whole(backend: tokenizers.Tokenizer, tokens: list[str], special: bool, strip: bool = False) -> None:
    add = backend.add_special_tokens if special else backend.add_tokens
    add([AddedToken(t, special=special, normalized=False, rstrip=strip and t not in UNSTRIPPED) for t in tokens])


def _begin_and_end(backend: tokenizers.Tokenizer, tokens: Sequence[str], bos: int | None, eos: int | None) -> None:
    if bos is None and eos is None:
        return
    # Under names of our own: a token's text may read as the template's syntax.
    around = {name: i for name, i in (("begin", bos), ("end", eos)) if i is not None}
    backend.post_processor = processors.TemplateProcessing(
        single=[*(["begin"] if bos is not None else []), "$A", *(["end"] if eos is not None else [])],
        special_tokens=[{"id": name, "ids": [i], "tokens": [tokens[i]]} for name, i in around.items()],
    )


def _respelled(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """User-defined runs of spaces as SentencePiece writes them: llama.cpp's converter writes real spaces."""
    known = set(tokens)
    low = [SPACE * len(token) for token in tokens]
    return [
        line if kind == USER_DEFINED and token and not token.strip(" ") and line not in known else token
        for token, kind, line in zip(tokens, types, low)
    ]


def _merges(tokens: list[str], scores: Sequence[float], types: Sequence[int], where: str) -> list[tuple[str, str]]:
    """Every pair of pieces that gives a piece, in the order in which SentencePiece would join them.

    What is matched whole is no part of this, but for user-defined runs of spaces: `transformers` merges Gemma's as it
    does the others, and before them. Of pieces of one score SentencePiece joins the leftmost; here the longest left
    part comes first, which is the same for Llama 2's runs of spaces, whose scores are all -1e9.
    """
    ids: dict[str, int] = {}
    ranks: list[tuple[bool, float]] = []
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types)):
        spaces = kind == USER_DEFINED and not token.strip(SPACE)
        ranks.append((not spaces, i if spaces else -score))
        if token and (spaces or not (kind in (UNKNOWN, CONTROL, USER_DEFINED) or BYTE_PIECE.fullmatch(token))):
            ids[token] = i
    # A hostile table could ask for far more work and memory than it has bytes. (Llama 2's pieces have six characters
    # and two merges each; Gemma's, seven and three.)
    longest, total, most = max(map(len, ids), default=0), sum(map(len, ids)), 8 * len(tokens) + 1024
    if longest > LONGEST_PIECE or total > 64 * len(tokens) + 4096:
        raise _foreign(where, f"its {len(tokens):,} tokens have {total:,} characters, one of them {longest:,}.")
    place = {rank: n for n, rank in enumerate(sorted(set(ranks)))}
    found = array.array("q")
    starts: list[int] = []  # the pieces that a piece begins with: in sorted order they come one after another before it
    for token in sorted(ids):
        i = ids[token]
        while starts and not token.startswith(tokens[starts[-1]]):
            starts.pop()
        rank = place[ranks[i]]
        for left in starts:
            cut = len(tokens[left])
            if (right := ids.get(token[cut:])) is not None:
                found.extend((rank, -cut, i, left, right))
        starts.append(i)
        if len(found) > 5 * most:
            raise _foreign(where, f"its {len(tokens):,} tokens come about by more than {most:,} merges.")
    table = np.frombuffer(found, np.int64).reshape(-1, 5)
    order = np.lexsort(table[:, 2::-1].T)
    lefts, rights = table[order, 3].tolist(), table[order, 4].tolist()
    return [(tokens[left], tokens[right]) for left, right in zip(lefts, rights)]


def _foreign(where: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{where} has no vocabulary of SentencePiece's: {what}",
        why=f"it trains no token of more than {LONGEST_PIECE} characters; most have less than ten, and two merges.",
        fix="load the Hugging Face folder of this model, with its tokenizer.json",
    )
