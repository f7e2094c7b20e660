"""The tokenizer against transformers, its stream, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from infopt.errors import CheckpointError, PromptError
from infopt.io import gguf, load
from infopt.io.tokenizer import Tokenizer

GOLDENS = json.loads((Path(__file__).parents[1] / "fixtures" / "tokenizer_goldens.json").read_text())
TOPICS = "".join(topics[key] for key in sorted(topics))


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    read = gguf.open_checkpoint(smollm2, "float32").tokenizer
    assert read is not None
    return read


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama 2's: words marked by a low line, unknown characters as bytes <0xNN>, the first space dropped."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁ab", "é", "▁▁"]
    merges = [("▁", "a"), ("▁a", "b"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {w: i for i, w in enumerate(words)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
            continuing_subword_prefix="",
            end_of_word_suffix="",
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return Tokenizer(backend)


# ----------------------------------------------------------------------------------------------- against transformers


def test_prompt_is_the_known_thirteen_tokens(tokenizer: Tokenizer) -> None:
    prompt = "The history of the steam engine begins in the first century, when"
    assert tokenizer.encode(prompt) == [504, 1463, 282, 260, 9403, 2327, 5634, 281, 260, 808, 2070, 28, 645]


@pytest.mark.parametrize("text, ids", GOLDENS["strings"], ids=[repr(text)[:30] for text, _ in GOLDENS["strings"]])
def test_tricky_strings_equal_transformers(text: str, ids: list[int], tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(text) == ids
    if not any(ord(c) < 32 for c in text):  # SmolLM2 has no tokens for some control characters
        assert tokenizer.decode(ids) == text


def test_topics_are_restored_without_loss(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(TOPICS)) == TOPICS


def test_topics_equal_transformers_token_by_token(tokenizer: Tokenizer) -> None:
    golden = GOLDENS["topics"].get(hashlib.sha256(TOPICS.encode()).hexdigest())
    if golden is None:
        pytest.skip("this Python's pydoc_data.topics has no golden; tests/fixtures/make_tokenizer_goldens.py makes one")
    ids = tokenizer.encode(TOPICS)
    assert len(ids) == golden["tokens"]
    assert hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest() == golden["sha256"]


def test_llama_bpe_splits_as_llama3_does() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer.from_tables([*alphabet, "<bos>"], [], [1] * 256 + [3], "llama-bpe", bos=256)
    assert made.encode("a")[0] == 256
    words = [word for word, _ in made.backend.pre_tokenizer.pre_tokenize_str("It'S 12345  x\n\n y!\n")]
    assert words == ["It", "'S", "Ġ", "123", "45", "Ġ", "Ġx", "ĊĊ", "Ġy", "!Ċ"]


def test_llama_bpe_takes_a_word_that_no_merges_lead_to() -> None:
    made = Tokenizer.from_tables(["a", "b", "c", "abc"], [], [], "llama-bpe")
    assert made.encode("abc") == [3]
    assert Tokenizer.from_tables(["a", "b", "c", "abc"], [], [], "gpt-2").encode("abc") == [0, 1, 2]


# ----------------------------------------------------------------------------------------------------------- streaming


def chunked(ids: list[int], rng: np.random.Generator) -> list[list[int]]:
    cuts = sorted(rng.integers(0, len(ids) + 1, len(ids) // 2))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)])]


def check_stream(tokenizer: Tokenizer, pieces: list[list[int]]) -> list[str]:
    """The texts that the stream gives; joined they are the text of all tokens."""
    stream, ids = tokenizer.stream(), [i for piece in pieces for i in piece]
    texts = [stream.push(piece) for piece in pieces]
    assert not any(text.endswith("\ufffd") for text in texts)
    texts.append(stream.flush())
    assert "".join(texts) == tokenizer.decode(ids)
    return texts


def test_stream_never_gives_half_a_character(tokenizer: Tokenizer) -> None:
    text = "naïve 日本語 👩‍👩‍👧 𝓗𝓮𝓵𝓵𝓸 🎉🎉 हिन्दी end"
    texts = check_stream(tokenizer, [[i] for i in tokenizer.encode(text)])
    assert "".join(texts) == text and "\ufffd" not in "".join(texts) and texts[-1] == ""
    assert any(t == "" for t in texts[:-1]), "some token ends within a character"


def test_stream_gives_text_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The steam engine")
    assert check_stream(tokenizer, [[i] for i in ids]) == ["The", " steam", " engine", ""]


def test_stream_of_any_tokens_joins_to_their_text(tokenizer: Tokenizer, byte_fallback: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    for any_tokenizer in (tokenizer, byte_fallback):
        lone_bytes = [i for w, i in any_tokenizer.backend.get_vocab().items() if len(w) == 1 or w.startswith("<0x")]
        for trial in range(300):
            source = rng.integers(0, any_tokenizer.vocab_size, 24) if trial % 2 else rng.choice(lone_bytes, 24)
            check_stream(any_tokenizer, chunked([int(i) for i in source], rng))


def test_stream_waits_for_a_run_of_fallback_bytes(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("ab 你é")
    assert byte_fallback.decode(ids) == "ab 你é"
    texts = check_stream(byte_fallback, [[i] for i in ids])
    assert texts == ["ab", " ", "", "", "", "你é", ""]
    # One more byte after a whole character makes the run unreadable, so nothing of it may be out before.
    check_stream(byte_fallback, [[i] for i in ids[2:5]] + [[1 + 0xE4]])


def test_stream_starts_anew_after_flush(tokenizer: Tokenizer) -> None:
    stream, ids = tokenizer.stream(), tokenizer.encode("🎉")
    assert (stream.push(ids[:1]), stream.flush()) == ("", "\ufffd")
    assert stream.push(ids) + stream.flush() == "🎉"


# ----------------------------------------------------------------------------------------------------- one vocabulary


def test_equal_vocabularies_are_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.backend.to_str())
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again == tokenizer and hash(again) == hash(tokenizer) and again.digest == tokenizer.digest
    other = Tokenizer.from_tables(["b", "a"], [], [], "gpt-2")
    assert other != Tokenizer.from_tables(["a", "b"], [], [], "gpt-2") and other != "a tokenizer"


def test_published_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    backend = Tokenizer.from_tables(["a", "b", "<pad>"], [], [1, 1, 3], "gpt-2").backend
    backend.enable_truncation(2)
    backend.enable_padding(length=8, pad_id=2, pad_token="<pad>")
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").encode("abab") == [0, 1, 0, 1]


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("bad", [-1, 49152, 10**12])
def test_token_outside_the_vocabulary_is_refused(bad: int, tokenizer: Tokenizer) -> None:
    for read in (tokenizer.decode, tokenizer.stream().push):
        with pytest.raises(PromptError, match=f"token {bad} is outside the vocabulary"):
            read([504, bad])


@pytest.mark.parametrize("text, said", [("a\ud800", "a lone surrogate"), (b"bytes", "a bytes"), (None, "a NoneType")])
def test_prompt_that_is_not_text_is_refused(text: Any, said: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=said):
        tokenizer.encode(text)


def hostile(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    tables = Tokenizer.from_tables(["a", "b", "ab", "<s>"], ["a b"], [1, 1, 1, 3], "gpt-2", bos=3)
    tree = json.loads(tables.backend.to_str())
    change(tree)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    return tmp_path / "tokenizer.json"


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize("change, said", [
    (lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [DOUBLE] * 40}), "lengthens a text"),
    (lambda t: t["post_processor"].update(special_tokens={}), "which token that is|cannot be read"),
    (lambda t: t["model"].update(continuing_subword_prefix="abc"), "does not begin with 'abc'"),
    (lambda t: t.update(decoder={"type": "Strip", "content": " ", "start": 99, "stop": 0}), "strips more than one"),
], ids=["growth", "template", "prefix", "strip"])  # fmt: skip
def test_a_hostile_tokenizer_is_refused_before_the_library_panics(
    change: Any, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match=said):
        Tokenizer.from_file(hostile(tmp_path, change)).encode("ab")
    assert capfd.readouterr().err == ""


def test_a_tokenizer_that_fails_on_a_text_says_so() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    with pytest.raises(CheckpointError, match="fails on this text"):
        Tokenizer(backend).encode("b")


def test_streaming_a_long_run_of_fallback_bytes_is_no_square(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("你" * 2000)
    assert "".join(check_stream(byte_fallback, [[i] for i in ids])) == byte_fallback.decode(ids)
    looked_up, backend = 0, byte_fallback.backend

    class Counting:
        def __getattr__(self, name: str) -> Any:
            nonlocal looked_up
            looked_up += name == "id_to_token"
            return getattr(backend, name)

    check_stream(Tokenizer(Counting()), [[i] for i in ids])  # type: ignore[arg-type]
    assert looked_up <= 2 * len(ids)


def bpe_fields(**changes: Any) -> dict[str, Any]:
    words = sorted(pre_tokenizers.ByteLevel.alphabet())[:94] + ["zz", "<end>"]
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": words,
        "merges": ["z z"],
        "token_type": [1] * 95 + [3],
        "eos_token_id": 95,
        "add_bos_token": False,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize("changes, said", [
    ({"pre": "gpt-3"}, r"unknown pre-tokenizer, 'gpt-3'[\s\S]*did you mean 'gpt-2'"),
    ({"pre": None}, "'tokenizer.ggml.pre' is missing"),
    ({"merges": ["z q q"]}, "outside its vocabulary"),
    ({"merges": ["zz zz"]}, "joins 'zz' and 'zz' to a token outside its vocabulary"),
    ({"tokens": ["a"] * 96, "merges": ["a a"]}, "outside its vocabulary|damaged vocabulary"),
    ({"token_type": [1] * 9}, "damaged vocabulary"),
    ({"eos_token_id": 96}, "starts or ends a text with token 96"),
    ({"add_bos_token": True}, "'tokenizer.ggml.bos_token_id' is missing"),
])  # fmt: skip
def test_damaged_tables_are_refused(changes: dict[str, Any], said: str, llama_gguf: Callable, tmp_path: Path) -> None:
    file = llama_gguf()
    file.fields |= bpe_fields(**changes)
    with pytest.raises(CheckpointError, match=said):
        load(file.write(tmp_path / "m.gguf"))


def test_tables_of_a_file_become_a_tokenizer(llama_gguf: Callable, tmp_path: Path) -> None:
    file = llama_gguf()
    file.fields |= bpe_fields(add_bos_token=True, bos_token_id=95, eot_token_id=3)
    read = load(file.write(tmp_path / "m.gguf"))[0].tokenizer
    assert read.encode("zzz<end>") == [95, 94, read.encode("z")[1], 95]
    assert read.eos_ids == (95, 3) and read.vocab_size == 96


def test_file_without_tokenizer_takes_token_ids(llama_gguf: Callable, tmp_path: Path) -> None:
    assert load(llama_gguf().write(tmp_path / "m.gguf"))[0].tokenizer is None
