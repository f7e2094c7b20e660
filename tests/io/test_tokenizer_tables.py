"""Tokenizers out of a GGUF file's tables: against transformers and sentencepiece, bounded, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infopt.errors import CheckpointError
from infopt.io import gguf, load
from infopt.io.tokenizer import BYTE_PIECES, SPACE, SPLITTINGS, Tokenizer

FOLDER = Path(__file__).parents[1] / "fixtures" / "tokenizers"
GOLDENS = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in ("llama", "gemma", "bytes")}
BYTES = GOLDENS["bytes"]
DECOMPOSED = re.compile("[\u0300-\u036f\u1100]")
KINDS = ["llama", "gemma", *BYTES["goldens"]]


def fields_of(kind: str) -> dict[str, Any]:
    """A GGUF file's metadata."""
    fields = GOLDENS[kind]["fields"] if kind in GOLDENS else BYTES["fields"] | {"pre": kind, "add_bos_token": False}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def strings_of(kind: str) -> list[tuple[str, list[int]]]:
    return GOLDENS[kind]["strings"] if kind in GOLDENS else list(zip(BYTES["texts"], BYTES["goldens"][kind]))


def read(fields: dict[str, Any], arch: str = "llama") -> Tokenizer:
    made = gguf._tokenizer(gguf.File("m.gguf", {"general.architecture": arch} | fields, {}))
    assert made is not None
    return made


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind: str) -> Tokenizer:
    return read(fields_of(kind))


# ----------------------------------------------------------------------------------------------- against transformers


def test_tokens_equal_transformers(kind: str, tokenizer: Tokenizer) -> None:
    wrong = {text: tokenizer.encode(text, special=False) for text, ids in strings_of(kind)}
    assert wrong == dict(strings_of(kind))


def test_texts_that_sentencepiece_reads_otherwise_hold_special_tokens_or_many_spaces() -> None:
    for kind in ("llama", "gemma"):
        tokens, types = (GOLDENS[kind]["fields"][key] for key in ("tokens", "token_type"))
        special = [t for t, kind in zip(tokens, types) if kind in (2, 3, 4) and t.strip(" ")]
        assert 4 <= len(GOLDENS[kind]["differs"]) <= 6
        for text in GOLDENS[kind]["differs"]:
            assert any(token in text for token in special) or (kind == "gemma" and " " * 32 in text), text


def test_texts_are_restored(kind: str, tokenizer: Tokenizer) -> None:
    for text, ids in strings_of(kind):
        # A composed text stays composed, and the space that is put before a stretch of text stays, too.
        if text in GOLDENS["llama"]["differs"] if kind == "llama" else kind == "qwen2" and DECOMPOSED.search(text):
            continue
        assert tokenizer.decode(ids) == (text.replace(SPACE, " ") if kind in GOLDENS else text)


def test_stream_joins_to_the_text_of_all_tokens(kind: str, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    lone_bytes = [i for w, i in tokenizer.backend.get_vocab().items() if len(w) == 1 or w.startswith("<0x")]
    every = [ids for _, ids in strings_of(kind)]
    every += [rng.integers(0, tokenizer.vocab_size, 20).tolist() for _ in range(50)]
    every += [rng.choice(lone_bytes, 20).tolist() for _ in range(50)]
    for ids in every:
        stream, text, at = tokenizer.stream(), "", 0
        while at < len(ids):
            step = int(rng.integers(1, 4))
            text += stream.push(ids[at : at + step])
            at += step
        assert text + stream.flush() == tokenizer.decode(ids)


def test_stream_after_a_prompt_gives_what_the_whole_text_has_behind_it(kind: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The steam engine was built in 1712, naïve 🎉 日本", special=False)
    for cut in range(len(ids) + 1):
        prompt, stream = tokenizer.decode(ids[:cut]), tokenizer.stream(ids[:cut])
        if not prompt.endswith("\ufffd"):  # else a character is cut in two
            assert prompt + stream.push(ids[cut:]) + stream.flush() == tokenizer.decode(ids), cut


def test_vocabulary_equals_that_of_transformers_and_of_its_tokenizer_json(
    kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert tokenizer.digest == GOLDENS.get(kind, BYTES)["digest"]
    (tmp_path / "tokenizer.json").write_text(tokenizer.backend.to_str())
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again == tokenizer
    assert all(again.encode(text, special=False) == ids for text, ids in strings_of(kind))


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen2", "llama-bpe"])
def test_model_of_a_file_reads_text(kind: str, llama_gguf: Callable, gemma3_gguf: Callable, tmp_path: Path) -> None:
    fields = fields_of(kind)
    if kind == "llama-bpe":
        fields |= {
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.bos_token_id": len(BYTES["fields"]["tokens"]) - 5,
        }
    file = (gemma3_gguf if kind == "gemma" else llama_gguf)(vocab=len(fields["tokenizer.ggml.tokens"]))
    file.fields |= fields
    made = load(file.write(tmp_path / "m.gguf"))[0].tokenizer
    start = [] if kind == "qwen2" else [fields["tokenizer.ggml.bos_token_id"]]
    assert {text: made.encode(text) for text, _ in strings_of(kind)} == {t: start + ids for t, ids in strings_of(kind)}
    assert made.digest == read(fields_of(kind)).digest


# ------------------------------------------------------------------------------------------------------ the splittings


def test_splittings_that_transformers_lacks() -> None:
    def words(pre: str, text: str) -> list[str]:
        return [word for word, _ in SPLITTINGS[pre].pre_tokenizer(False).pre_tokenize_str(text)]

    assert words("default", "It's 12345 (x) +b") == [
        "It",
        "'",
        "s",
        "Ġ",
        "123",
        "45",
        "Ġ",
        "(",
        "x",
        ")",
        "Ġ",
        "+",
        "b",
    ]
    assert words("deepseek-coder", "\n\nIt's 12 (x)") == ["Ċ", "Ċ", "It", "'", "s", "Ġ", "1", "2", "Ġ(", "x", ")"]


def test_splittings_of_one_kind_give_the_same_tokens() -> None:
    for text, ids in strings_of("llama-bpe"):
        for pre in ("llama3", "llama-v3", "smaug-bpe"):
            assert read(fields_of("llama-bpe") | {"tokenizer.ggml.pre": pre}).encode(text) == ids
        if "steamship" not in text:
            assert read(fields_of("llama-bpe") | {"tokenizer.ggml.pre": "dbrx"}).encode(text) == ids
    for text, ids in strings_of("qwen2"):
        if not DECOMPOSED.search(text):
            assert read(fields_of("qwen2") | {"tokenizer.ggml.pre": "deepseek-r1-qwen"}).encode(text) == ids


# ----------------------------------------------------------------------------------------- what is put around a text


@pytest.mark.parametrize("pre, starts", [("llama-bpe", True), ("tekken", True), ("smaug-bpe", False), ("qwen2", False)])
def test_start_of_text_that_the_file_leaves_out_is_the_splittings(pre: str, starts: bool) -> None:
    fields = fields_of("qwen2") | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.bos_token_id": 7}
    del fields["tokenizer.ggml.add_bos_token"]
    assert (read(fields).encode("a")[0] == 7) == starts


def test_start_and_end_are_put_around_a_text() -> None:
    fields = fields_of("llama")
    plain = read(fields).encode("Hello", special=False)
    assert read(fields).encode("Hello") == [1, *plain]  # a file that says nothing means yes
    assert read(fields | {"tokenizer.ggml.add_bos_token": False}).encode("Hello") == plain
    assert read(fields | {"tokenizer.ggml.add_eos_token": True}).encode("Hello") == [1, *plain, 2]
    assert read(fields | {"tokenizer.ggml.add_eos_token": True}).encode("") == [1, 2]
    assert read(fields).eos_ids == (2,)


@pytest.mark.parametrize("start", ["$A", "a:1", ":", "$", " "])
def test_start_may_read_as_anything(start: str) -> None:
    made = Tokenizer.from_tables(["a", start], [], [1, 3], "gpt-2", bos=1, eos=1)
    assert made.encode("a") == [1, 0, 1]


def test_space_before_a_text_is_the_files() -> None:
    fields = fields_of("gpt-2")
    ids = read(fields).encode(" Hello")
    assert read(fields | {"tokenizer.ggml.add_space_prefix": True}).encode("Hello") == ids
    assert read(fields).encode("Hello") != ids
    fields = fields_of("llama")
    assert read(fields | {"tokenizer.ggml.add_space_prefix": False}).encode(" Hello") == read(fields).encode("Hello")


def test_blanks_after_phi3s_special_tokens_are_dropped() -> None:
    fields = fields_of("llama")
    inst, after = fields["tokenizer.ggml.tokens"].index("[INST]"), "[INST] \n Hello"
    hello = read(fields).encode("Hello", special=False)
    assert read(fields, "phi3").encode(after, special=False) == [inst, *hello]
    assert read(fields, "llama").encode(after, special=False) != [inst, *hello]
    assert read(fields, "phi3").encode("<s> Hello", special=False) != [1, *hello]


# ------------------------------------------------------------------------------------------------------------- merging


def joined(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's algorithm, from its description: join the pair of the highest score, the leftmost of equals."""
    parts = list(SPACE + text.replace(" ", SPACE))
    while pairs := [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@pytest.mark.parametrize("seed", range(20))
def test_merging_is_sentencepieces_for_any_scores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = [SPACE, *"abc"]
    while len(pieces) < 60:
        new = "".join(rng.choice(pieces, 2))
        if new not in pieces and len(new) < 9:
            pieces.append(new)
    scores = [-float(x) for x in rng.permutation(len(pieces))]
    tokens = ["<unk>", *pieces]
    made = Tokenizer.from_pieces(tokens, [0.0, *scores], [2] + [1] * len(pieces), unknown=0)
    known = dict(zip(pieces, scores))
    for _ in range(40):
        text = "".join(rng.choice([*"aabbc "], rng.integers(1, 30)))
        assert [tokens[i] for i in made.encode(text)] == joined(text, known), text


def test_runs_of_spaces_of_one_score_are_joined_from_the_left() -> None:
    """As in Llama 2's vocabulary, where their score is below that of any other piece."""
    runs = [SPACE * n for n in range(2, 17)]
    tokens = ["<unk>", SPACE, "a", SPACE + "a", *runs]
    made = Tokenizer.from_pieces(tokens, [0.0, -9, -8, -1, *[-1e9] * 15], [2] + [1] * 18, unknown=0)
    for n in range(40):
        ids = made.encode(" " * n + "a")
        assert [len(tokens[i]) for i in ids[:-1]] == [16] * (n // 16) + [n % 16] * (n % 16 > 0)
        assert tokens[ids[-1]] == SPACE + "a"


def test_characters_without_a_piece_become_bytes_or_one_unknown() -> None:
    rest = [SPACE, "a"]
    made = Tokenizer.from_pieces(
        ["<unk>", *BYTE_PIECES, *rest], [0.0] * 259, [2] + [6] * 256 + [1] * 2, prefix=False, unknown=0
    )
    assert made.encode("aé") == [258, 1 + 0xC3, 1 + 0xA9] and made.decode(made.encode("aé日")) == "aé日"
    made = Tokenizer.from_pieces(["<unk>", *rest], [0.0] * 3, [2, 1, 1], prefix=False, unknown=0)
    assert made.encode("aéé a") == [2, 0, 1, 2]


def test_user_defined_spaces_are_low_lines_unless_both_are_there() -> None:
    types = [2, 1, 4, 1]
    made = Tokenizer.from_pieces(["<unk>", SPACE, "  ", "a"], [0.0] * 4, types, prefix=False, unknown=0)
    assert made.encode("   a") == [2, 1, 3] and made.decode([2, 3]) == "  a" and made.vocab_size == 4
    made = Tokenizer.from_pieces(["<unk>", SPACE, "  ", SPACE * 2], [0.0] * 4, types, prefix=False, unknown=0)
    assert made.vocab_size == 4 and made.encode("  ") == [2]


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("tokens, said", [
    (["a", "b" * 10**6], "1,000,001 characters, one of them 1,000,000"),
    (["a" * n for n in range(1, 513)], "131,328 characters"),
    ([c * n for c in "abcdefgh" for n in range(1, 100)], "by more than"),
    ([f"{n:0513}" for n in range(3)], "one of them 513"),
])  # fmt: skip
def test_tables_that_ask_for_more_work_than_they_have_bytes_are_refused(tokens: list[str], said: str) -> None:
    tokens = ["<unk>", *tokens]
    with pytest.raises(CheckpointError, match=f"no vocabulary of SentencePiece's.*{said}"):
        Tokenizer.from_pieces(tokens, [0.0] * len(tokens), [2] + [1] * (len(tokens) - 1), unknown=0)


def test_empty_token_is_never_made() -> None:
    made = Tokenizer.from_pieces(["<unk>", "", "a", "aa"], [0.0] * 4, [2, 1, 1, 1], prefix=False, unknown=0)
    assert made.encode("aaa") == [3, 2] and made.decode([1, 3]) == "aa"
    made = Tokenizer.from_pieces(["<unk>", "", "a"], [0.0] * 3, [2, 4, 1], prefix=False, unknown=0, bos=1)
    assert made.encode("a") == [1, 2]


def test_long_token_that_is_matched_whole_costs_nothing() -> None:
    made = Tokenizer.from_pieces(["<unk>", "a", "b" * 10**6], [0.0] * 3, [2, 1, 4], prefix=False, unknown=0)
    assert made.encode("a" + "b" * 10**6) == [1, 2]


def spoiled(key: str, change: Callable[[list[Any]], Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": change(list(GOLDENS["llama"]["fields"][key]))}


@pytest.mark.parametrize("changes, said", [
    (spoiled("scores", lambda x: x[:-1]), "damaged scores: 1499 for 1500 tokens"),
    (spoiled("scores", lambda x: [*x[:-1], float("nan")]), "damaged scores.*one of them nan"),
    (spoiled("scores", lambda x: [*x[:-1], float("inf")]), "damaged scores.*one of them inf"),
    (spoiled("scores", lambda x: [*x[:-1], "high"]), "scores' holds 'high'"),
    (spoiled("scores", lambda x: None), "'tokenizer.ggml.scores' is missing"),
    (spoiled("tokens", lambda x: [*x[:-1], x[-2]]), "damaged vocabulary: 1500 tokens, 1499 of them different"),
    (spoiled("tokens", lambda x: [*x[:-1], 5]), "tokens' holds 5"),
    (spoiled("tokens", lambda x: [t if t != "<0x41>" else "<0x4>" for t in x]), "no token for <0x41>"),
    (spoiled("token_type", lambda x: x[:-1]), "damaged vocabulary"),
    ({"tokenizer.ggml.unknown_token_id": 1500}, "starts or ends a text with token 1500, or has it for what is unknown"),
    ({"tokenizer.ggml.unknown_token_id": "x"}, "with token 'x'"),
    ({"tokenizer.ggml.bos_token_id": 1500}, "with token 1500"),
    ({"tokenizer.ggml.bos_token_id": None}, "'tokenizer.ggml.bos_token_id' is missing"),
    ({"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eos_token_id": None}, "eos_token_id' is missing"),
    ({"tokenizer.ggml.add_space_prefix": 3}, "'tokenizer.ggml.add_space_prefix' is 3"),
    ({"tokenizer.ggml.model": "t5"}, r"of the kind 't5' \(Unigram\)[\s\S]*fix: load the Hugging Face folder"),
    ({"tokenizer.ggml.model": "bert"}, r"of the kind 'bert' \(WordPiece\)"),
    ({"tokenizer.ggml.model": "rwkv"}, "of the kind 'rwkv'"),
    ({"tokenizer.ggml.model": [1]}, r"of the kind \[1\]"),
])  # fmt: skip
def test_damaged_and_foreign_tables_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read({key: value for key, value in (fields_of("llama") | changes).items() if value is not None})


def test_vocabulary_without_bytes_and_unknown_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no token for unknown characters"):
        Tokenizer.from_pieces(["a"], [0.0], [1])
