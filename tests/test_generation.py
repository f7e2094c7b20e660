"""generate: rows alone and together, stops, streaming, logprobs, speculation, compilations, refusals."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt.errors import ParamsError, PromptError, SamplingError
from infopt.generation import BUCKETS, compiled
from infopt.model import Weights
from infopt.reference import reference
from infopt.sampling import Sampling

VOCAB, DIM, CONTEXT = 32, 32, 256
BARE = ip.models.llama(
    layers=1, dim=DIM, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=VOCAB, context=CONTEXT, tied=False
)
CACHED = ip.cache_kv()(BARE)
PARAMS = BARE.init(jax.random.key(1))
RAGGED = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (3, 9, 1)]
SEEDS = [5, 6, 7]


def logits(model: ip.Model, params: Any, tokens: list[int]) -> np.ndarray:
    """The numpy model's, of a stack's target."""
    weights = Weights.of(model.spec, params)
    plain = {name: weights[name] for name in weights if not name.startswith("draft.")}
    return reference(ip.oracle(model.spec), plain, tokens)


def assert_greedy(model: ip.Model, params: Any, prompt: list[int], tokens: list[int]) -> None:
    """Fed back to the numpy model, each token is the likeliest (or tied to rounding)."""
    scores = logits(model, params, prompt + tokens)[len(prompt) - 1 : -1]
    chosen = scores[np.arange(len(tokens)), tokens]
    assert (scores.max(-1) - chosen).max() < 1e-4 * scores.std()


# ---------------------------------------------------------------------------------------------- token ids, plainly


@functools.cache
def greedy() -> ip.Generation:
    return ip.generate(CACHED, PARAMS, RAGGED, max_new=12, logprobs=True)


def test_greedy_tokens_are_the_numpy_models_own() -> None:
    for prompt, tokens in zip(RAGGED, greedy().tokens, strict=True):
        assert len(tokens) == 12
        assert_greedy(CACHED, PARAMS, prompt, tokens)


def test_an_uncached_model_gives_the_same_tokens() -> None:
    out = ip.generate(BARE, PARAMS, RAGGED, max_new=12)
    assert out.tokens == greedy().tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 9, "repetition_penalty": 1.2}], ids=str)
def test_rows_of_a_ragged_batch_are_what_each_prompt_gives_alone(options: dict) -> None:
    together = ip.generate(CACHED, PARAMS, RAGGED, max_new=12, seed=SEEDS, **options)
    for row, prompt in enumerate(RAGGED):
        alone = ip.generate(CACHED, PARAMS, prompt, max_new=12, seed=[SEEDS[row]], **options)
        assert alone.tokens == together.tokens[row]


def test_equal_prompts_differ_by_their_seeds_and_a_seed_repeats() -> None:
    one = ip.generate(CACHED, PARAMS, [[4, 5]] * 3, max_new=12, temperature=1.0, seed=3)
    assert len({tuple(t) for t in one.tokens}) == 3
    two = ip.generate(CACHED, PARAMS, [[4, 5]] * 3, max_new=12, temperature=1.0, seed=[4, 3, 5])
    assert [two.tokens[1], two.tokens[0], two.tokens[2]] == one.tokens


def test_logprobs_are_the_numpy_models_log_softmax() -> None:
    out = greedy()
    for prompt, tokens, got in zip(RAGGED, out.tokens, out.logprobs, strict=True):
        x = logits(CACHED, PARAMS, prompt + tokens)[len(prompt) - 1 : -1]
        want = x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
        np.testing.assert_allclose(got, want[np.arange(len(tokens)), tokens], atol=1e-4)


def test_logprobs_of_sampled_tokens_are_before_temperature_and_cuts() -> None:
    out = ip.generate(CACHED, PARAMS, RAGGED, max_new=12, temperature=2.0, top_k=5, logprobs=True)
    for prompt, tokens, got in zip(RAGGED, out.tokens, out.logprobs, strict=True):
        x = logits(CACHED, PARAMS, prompt + tokens)[len(prompt) - 1 : -1]
        want = x - np.log(np.exp(x).sum(-1, keepdims=True))
        np.testing.assert_allclose(got, want[np.arange(len(tokens)), tokens], atol=1e-4)


def test_a_single_prompt_gives_values_and_a_list_gives_lists() -> None:
    alone = ip.generate(CACHED, PARAMS, RAGGED[0], max_new=12)
    assert isinstance(alone.tokens[0], int)
    assert (alone.finish, alone.text, alone.logprobs) == ("length", None, None)
    listed = ip.generate(CACHED, PARAMS, [RAGGED[0]], max_new=12)
    assert listed.tokens == [alone.tokens]
    assert listed.finish == ["length"]


def test_prompts_may_be_numpy_and_jax_arrays() -> None:
    want = ip.generate(CACHED, PARAMS, RAGGED[0], max_new=12).tokens
    assert ip.generate(CACHED, PARAMS, np.array(RAGGED[0]), max_new=12).tokens == want
    assert ip.generate(CACHED, PARAMS, jnp.array(RAGGED[0]), max_new=12).tokens == want
    assert ip.generate(CACHED, PARAMS, [np.array(RAGGED[0])], max_new=12).tokens == [want]
    assert ip.generate(CACHED, PARAMS, tuple(RAGGED[0]), max_new=12).tokens == want


@pytest.mark.parametrize("max_new", [1, 2, 32, 33, 50])
def test_max_new_tokens_come_whatever_the_rounds_in_a_call(max_new: int) -> None:
    out = ip.generate(CACHED, PARAMS, RAGGED, max_new=max_new, max_len=64)
    assert [len(t) for t in out.tokens] == [max_new] * 3
    assert out.tokens[0][:12] == greedy().tokens[0][:max_new]
    assert out.finish == ["length"] * 3
    assert out.new_tokens == 3 * max_new
    assert out.prompt_tokens == sum(map(len, RAGGED))
    assert (out.tokens_per_round, out.acceptance) == (1.0, None)


def test_a_stop_token_ends_its_row_only_and_is_the_last_token() -> None:
    tokens = greedy().tokens
    stop = tokens[0][4]
    out = ip.generate(CACHED, PARAMS, RAGGED, max_new=12, stop_tokens=[stop])
    for row in range(3):
        whole = tokens[row]
        want = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert out.tokens[row] == want
        assert out.finish[row] == ("stop" if stop in whole else "length")
    assert out.finish[0] == "stop"


def test_a_stop_token_in_the_last_place_counts_as_stop() -> None:
    tokens = greedy().tokens[0]
    stop = tokens[3]
    n = tokens.index(stop) + 1
    out = ip.generate(CACHED, PARAMS, RAGGED[0], max_new=n, stop_tokens=[stop])
    assert (out.tokens, out.finish) == (tokens[:n], "stop")


def test_compilations_are_bounded_whatever_prompts_and_options() -> None:
    """What `compiled` promises, for one batch size and one length of the state."""
    model = ip.sliding_window(200)(CACHED)  # a Spec of its own, so that only this test compiles it
    prefill, rounds = compiled(model.spec)
    assert (prefill.compilations, rounds.compilations) == (0, 0)
    lengths = [1, 2, 5, 9, 10, 17, 18, 40, 65, 66, 100, 129, 130, 150]
    for n in lengths:
        prompt = (np.arange(n) % VOCAB).tolist()
        out = ip.generate(model, PARAMS, prompt, max_new=4, max_len=200, temperature=float(n % 2), top_k=n % 5)
        assert len(out.tokens) == 4
        if n % 2 == 0:
            assert_greedy(model, PARAMS, prompt, out.tokens)
    assert prefill.compilations <= len(BUCKETS)
    assert rounds.compilations == 1
    again = ip.generate(model, PARAMS, [3, 4, 5], max_new=4, max_len=200, logprobs=True, min_p=0.1)
    assert again.compile_seconds == 0
    assert (prefill.compilations, rounds.compilations) == (len(BUCKETS), 1)


def test_lengths_double_so_that_few_are_compiled() -> None:
    """Twelve lengths of prompt, and no length of the state asked for: 64, 128 and 256 slots serve them all."""
    model = ip.sliding_window(199)(CACHED)
    prefill, rounds = compiled(model.spec)
    for n in (1, 3, 20, 33, 58, 61, 70, 90, 110, 126, 130, 200):
        ip.generate(model, PARAMS, (np.arange(n) % VOCAB).tolist(), max_new=4)
    assert rounds.compilations == 3
    assert prefill.compilations <= 3 * len(BUCKETS)


def test_the_state_is_donated_to_each_call() -> None:
    prefill, rounds = compiled(CACHED.spec)
    state = CACHED.init_state(1, 64, chunk=64)
    read = prefill(PARAMS, jnp.zeros((1, 8), jnp.int32), state, jnp.asarray([3], jnp.int32))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.kv))
    some = jnp.asarray([2], jnp.int32)
    rounds(PARAMS, some, read, Sampling.of(1), some, jnp.full(8, -2, jnp.int32), jnp.int32(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(read.kv))


def test_the_number_of_stop_tokens_compiles_nothing() -> None:
    rounds = compiled(CACHED.spec)[1]
    ip.generate(CACHED, PARAMS, RAGGED, max_new=2)
    before = rounds.compilations
    for n in (1, 2, 3):
        ip.generate(CACHED, PARAMS, RAGGED, max_new=2, stop_tokens=list(range(n)))
    assert rounds.compilations == before


def test_a_state_shorter_than_a_bucket_works_up_to_its_last_slot() -> None:
    prompt = np.random.default_rng(5).integers(0, VOCAB, 18).tolist()
    out = ip.generate(CACHED, PARAMS, prompt, max_new=3, max_len=21)
    assert_greedy(CACHED, PARAMS, prompt, out.tokens)


def test_defining_a_family_again_is_seen_by_generate() -> None:
    """In a notebook, `define` runs again with a corrected function: generate must not run the old one."""
    like = ip.model.FAMILIES["llama"]
    functions = {"init": like.init, "embed": like.embed, "block": like.block, "final": like.final}
    old = ip.Model.of(ip.define("again", like.config, **functions), BARE.spec.config)
    was, compiled_then = ip.model.build(old.spec), compiled(old.spec)
    new = ip.Model.of(ip.define("again", like.config, **functions), BARE.spec.config)
    assert old.spec == new.spec
    assert ip.model.build(new.spec) is not was
    assert compiled(new.spec) is not compiled_then


def test_speeds_are_positive_and_seconds_add_up() -> None:
    out = ip.generate(CACHED, PARAMS, RAGGED, max_new=12)
    assert out.tokens_per_second > 0
    assert out.prefill_tokens_per_second > 0
    assert out.decode_seconds > 0
    assert out.rounds == 36


# ------------------------------------------------------------------------------------------------------------- text

PIECES = [
    b"the",
    b" c",
    b"at",
    b" sat",
    b"\xc3",
    b"\xa9",
    b"\xf0\x9f",
    b"\x98\x80",
    b"\n",
    b"Us",
    b"er",
    b":",
    b" a",
    b"b",
    b"<eos>",
    b"aab",
    *[bytes([65 + i]) for i in range(VOCAB - 16)],
]


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A tokenizer whose pieces are bytes, some of them half a character."""

    eos_ids: tuple[int, ...] = ()
    digest: str = "bytes"
    vocab_size: int = VOCAB

    def encode(self, text: str) -> list[int]:
        ids, rest = [], text.encode()
        while rest:
            best = max((i for i, p in enumerate(PIECES) if rest.startswith(p)), key=lambda i: len(PIECES[i]))
            ids.append(best)
            rest = rest[len(PIECES[best]) :]
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(PIECES[i] for i in ids).decode(errors="replace")

    def stream(self, after: list[int]) -> Stream:
        return Stream()


class Stream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: list[int]) -> str:
        return self._decoder.decode(b"".join(PIECES[i] for i in ids))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


SPEAKER = dataclasses.replace(CACHED, tokenizer=Bytes())


def script(*chain: int) -> Any:
    """Params of a model that says `chain`, whatever came before: each token names the next, and the last ends in A."""
    following = np.full(VOCAB, 16)
    for a, b in itertools.pairwise(chain):
        following[a] = b
    head = np.zeros((VOCAB, DIM), np.float32)
    for a, b in enumerate(following):
        head[b, a] = 1.0
    params = jax.tree.map(lambda x: x, PARAMS)
    params |= {"embed": jnp.eye(VOCAB, DIM), "head": jnp.asarray(head), "final_norm": jnp.ones(DIM)}
    layer = dict(params["segments"][0][0])
    layer |= {n: jnp.zeros_like(layer[n]) for n in ("attn.o", "mlp.down")}
    return params | {"segments": ((layer,),)}


def streamed(prompts: Any, params: Any, **options: Any) -> tuple[list[ip.Chunk], ip.Generation]:
    chunks, it = [], ip.stream(SPEAKER, params, prompts, **options)
    while True:
        try:
            chunks.append(next(it))
        except StopIteration as end:
            return chunks, end.value


def assert_streams(params: Any, **options: Any) -> ip.Generation:
    """Streaming gives the text of the whole, piece by piece, and never takes a character back."""
    whole = ip.generate(SPEAKER, params, ["the"], **options)
    chunks, out = streamed(["the"], params, **options)
    assert (out.text, out.tokens, out.finish) == (whole.text, whole.tokens, whole.finish)
    assert "".join(c.text for c in chunks) == out.text[0]
    assert [t for c in chunks for t in c.tokens] == out.tokens[0]
    so_far = ""
    for chunk in chunks:
        so_far += chunk.text
        assert out.text[0].startswith(so_far)
    return out


def test_text_is_prompted_and_returned() -> None:
    out = ip.generate(SPEAKER, script(0, 1, 2, 3), "the", max_new=3)
    assert (out.tokens, out.text) == ([1, 2, 3], " cat sat")


def test_half_a_character_is_never_shown() -> None:
    params = script(0, 1, 4, 5, 6, 7, 8)
    chunks, out = streamed("the", params, max_new=6)
    assert out.text == " c" + "\u00e9" + "\U0001f600" + "\n"
    assert not any("\ufffd" in c.text for c in chunks)
    assert_streams(params, max_new=6)


def test_a_text_that_ends_within_a_character_shows_that_it_is_broken() -> None:
    out = assert_streams(script(0, 1, 6, 8), max_new=2)
    assert out.text == [" c\ufffd"]


STOPS = [
    # a stop string over three tokens, the first of which begins before it
    (("er:",), (0, 8, 9, 10, 11, 2), "\nUs", [8, 9, 10, 11]),
    (("\nUser:",), (0, 1, 8, 9, 10, 11, 2), " c", [1, 8, 9, 10, 11]),
    # one that begins with the first token, and one that lies across two calls of four rounds
    (("User:",), (0, 9, 10, 11, 2), "", [9, 10, 11]),
    (("User:",), (0, 1, 12, 3, 8, 9, 10, 11, 2), " c a sat\n", [1, 12, 3, 8, 9, 10, 11]),
    # begins like a stop string and is none
    (("User!",), (0, 1, 9, 10, 11), " cUser:AAAA", [1, 9, 10, 11, 16, 16, 16, 16]),
    # a partial match that begins again inside itself
    (("aabb",), (0, 12, 15, 13, 2), " a", [12, 15, 13]),
    # of several, the one that comes first in the text
    (("at", " c"), (0, 1, 2, 3), "", [1]),
    (("t", "at s", "sat"), (0, 1, 2, 3), " ca", [1, 2]),
    # a stop string with a character of two tokens in it
    (("\u00e9:",), (0, 1, 4, 5, 11), " c", [1, 4, 5, 11]),
]


@pytest.mark.parametrize(("stop", "chain", "text", "tokens"), STOPS, ids=[repr(s[0]) for s in STOPS])
def test_text_ends_before_a_stop_string(stop: Any, chain: Any, text: str, tokens: list[int]) -> None:
    out = ip.generate(SPEAKER, script(*chain), ["the"], max_new=8, stop=stop)
    assert out.text == [text]
    assert out.tokens == [tokens]
    assert out.finish == ["length" if len(tokens) == 8 else "stop"]
    assert out.new_tokens == len(tokens)


@pytest.mark.parametrize(("stop", "chain", "text", "tokens"), STOPS, ids=[repr(s[0]) for s in STOPS])
def test_streaming_never_shows_a_part_of_a_stop_string(stop: Any, chain: Any, text: str, tokens: list[int]) -> None:
    params = script(*chain)
    chunks, out = streamed(["the"], params, max_new=8, stop=stop)
    so_far = ""
    for chunk in chunks:
        so_far += chunk.text
        assert text.startswith(so_far)
    assert so_far == out.text[0] == text


@pytest.mark.parametrize(("stop", "chain", "text", "tokens"), STOPS[:2], ids=[repr(s[0]) for s in STOPS[:2]])
def test_chunks_give_the_tokens_of_the_result(stop: Any, chain: Any, text: str, tokens: list[int]) -> None:
    chunks, out = streamed(["the"], script(*chain), max_new=8, stop=stop)
    assert [t for c in chunks for t in c.tokens] == out.tokens[0] == tokens


def test_a_stop_string_leaves_one_token_a_round() -> None:
    """Rounds that ran on behind a stop string gave nothing: they must not count."""
    out = ip.generate(SPEAKER, script(0, 1, 2, 3), ["the"], max_new=6, stop=("at",))
    assert out.tokens == [[1, 2]]
    assert out.tokens_per_round == 1.0


def test_a_stop_string_ends_its_row_only() -> None:
    params = script(0, 1, 2, 3, 8)
    out = ip.generate(SPEAKER, params, ["the", " cat", "b"], max_new=4, stop="sat")
    assert out.text == [" cat ", " ", "AAAA"]
    assert out.finish == ["stop", "stop", "length"]


def test_the_tokenizers_end_of_text_stops_and_is_no_text() -> None:
    model = dataclasses.replace(SPEAKER, tokenizer=Bytes(eos_ids=(14,)))
    params = script(0, 1, 14, 2)
    out = ip.generate(model, params, ["the"], max_new=5)
    assert (out.text, out.tokens, out.finish) == ([" c"], [[1, 14]], ["stop"])
    out = ip.generate(model, params, ["the"], max_new=4, stop_tokens=[])
    assert out.text == [" c<eos>atA"]


def test_half_a_character_before_a_stop_token_is_flushed() -> None:
    out = ip.generate(SPEAKER, script(0, 1, 6, 14), ["the"], max_new=5, stop_tokens=[14])
    assert (out.text, out.tokens) == ([" c\ufffd"], [[1, 6, 14]])


def test_a_callback_gets_what_stream_gives() -> None:
    params, got = script(0, 1, 2, 3, 4, 5), []
    prompts = ["the", " c", "at"]
    out = ip.generate(SPEAKER, params, prompts, max_new=6, callback=got.append)
    chunks, same = streamed(prompts, params, max_new=6)
    assert got == chunks
    assert out.text == same.text == [" cat sat\u00e9A", "at sat\u00e9AA", " sat\u00e9AAA"]
    for row in range(3):
        assert "".join(c.text for c in got if c.row == row) == out.text[row]
        assert [t for c in got if c.row == row for t in c.tokens] == out.tokens[row]


def test_the_first_chunk_comes_before_the_last_token() -> None:
    it = ip.stream(SPEAKER, script(0, 1, 2, 3), "the", max_new=12)
    assert next(it) == ip.Chunk(0, " c", [1])
    it.close()


# ------------------------------------------------------------------------------------------------------ speculation

KV8 = ip.cache_kv(bits=8)(BARE)
RING = (ip.sliding_window(6, sinks=2) | ip.cache_kv(bits=8))(BARE)
PAGED = (ip.cache_kv(bits=8) | ip.paged(4))(BARE)
LONG = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (CONTEXT - 3, 9, 200)]
"""Past the context, and long enough that the ring, window + sinks + 128 - 1 slots of a state of 290, comes round."""
MIXED = {"temperature": [0.0, 1.0, 0.8], "top_p": [1.0, 0.95, 1.0], "seed": SEEDS}


def drafts(spec_params: Any) -> dict[str, Any]:
    """Params of one Spec: nearly the target's, the target's own, and a head whose likeliest word is the unlikeliest."""
    near = jax.tree.map(lambda x: x, spec_params) | {"head": spec_params["head"] * 0.9 + 0.01}
    return {"good": near, "own": spec_params, "hostile": spec_params | {"head": -spec_params["head"]}}


def speculated(target: ip.Model, k: int, draft_params: Any, prompts: Any, **options: Any) -> ip.Generation:
    model = ip.speculative(draft=target, k=k)(target)
    params = model.convert(PARAMS, draft=draft_params)
    return ip.generate(model, params, prompts, **options)


@functools.cache
def plain(name: str) -> ip.Generation:
    """Plain decoding's; of a paged cache that of the linear one, whose numbers are the same."""
    model, prompts, options = SPECULATIVE["linear" if name == "paged" else name]
    return ip.generate(model, PARAMS, prompts, max_new=17, logprobs=True, **options, **MIXED)


SPECULATIVE: dict[str, tuple[ip.Model, Any, dict[str, Any]]] = {
    "linear": (KV8, RAGGED, {"max_len": 64}),
    "ring": (RING, LONG, {"max_len": 290}),
    "paged": (PAGED, RAGGED, {"max_len": 64}),
}


@pytest.mark.parametrize("k", range(1, 6))
@pytest.mark.parametrize("layout", SPECULATIVE)
def test_speculation_gives_plain_decodings_tokens(layout: str, k: int) -> None:
    """Greedy and sampled rows together; a good draft, the model as its own draft, and one that is never right."""
    model, prompts, options = SPECULATIVE[layout]
    for name, draft in drafts(PARAMS).items():
        out = speculated(model, k, draft, prompts, max_new=17, logprobs=True, **options, **MIXED)
        assert out.tokens == plain(layout).tokens, name
        np.testing.assert_allclose(np.array(out.logprobs), np.array(plain(layout).logprobs), atol=2e-3)
        assert out.finish == ["length"] * 3
        assert 1 <= out.tokens_per_round <= k + 1
        if name == "own":
            assert out.acceptance == 1.0
            assert out.rounds == 3 * -(-17 // (k + 1))
        if name == "good":
            assert 0.5 < out.acceptance <= 1
        if name == "hostile":
            assert out.acceptance < 0.25, "by chance, in the sampled rows; the next test has greedy ones"


def test_a_hostile_draft_is_never_right_about_greedy_tokens() -> None:
    model, prompts, options = SPECULATIVE["linear"]
    out = speculated(model, 4, drafts(PARAMS)["hostile"], prompts, max_new=9, **options)
    assert out.acceptance == 0
    assert out.tokens_per_round == 1
    assert out.rounds == 27


def test_the_ring_of_these_tests_is_one() -> None:
    assert RING.init_state(3, 290, chunk=128).layouts[0].slots == 6 + 2 + 128 - 1
    assert KV8.init_state(3, 64, chunk=64).layouts[0].lookahead is None


def test_a_window_goes_past_the_context() -> None:
    """Row 0 begins 3 tokens before the context's end. 8-bit keys may round the other way, and little else may."""
    tokens = plain("ring").tokens[0]
    scores = logits(RING, PARAMS, LONG[0] + tokens)[len(LONG[0]) - 1 : -1]
    assert (scores.max(-1) - scores[np.arange(17), tokens]).max() < 3e-2 * scores.std()


@pytest.mark.parametrize("max_new", [1, 2, 4, 6, 7])
def test_max_new_within_a_round_cuts_it(max_new: int) -> None:
    model, prompts, options = SPECULATIVE["linear"]
    out = speculated(model, 4, PARAMS, prompts, max_new=max_new, **options, **MIXED)
    assert out.tokens == [t[:max_new] for t in plain("linear").tokens]
    assert out.acceptance == 1.0
    assert out.finish == ["length"] * 3


def test_a_stop_token_within_a_round_cuts_it() -> None:
    model, prompts, options = SPECULATIVE["linear"]
    whole = plain("linear").tokens
    stop = whole[1][6]
    out = speculated(model, 4, PARAMS, prompts, max_new=17, stop_tokens=[stop], **options, **MIXED)
    for row in range(3):
        want = whole[row][: whole[row].index(stop) + 1] if stop in whole[row] else whole[row]
        assert out.tokens[row] == want
        assert out.finish[row] == ("stop" if stop in whole[row] else "length")


def test_a_repetition_penalty_sees_the_same_text_under_speculation() -> None:
    """A guess's penalty counts the guesses before it, and nothing that was taken back."""
    model, prompts, options = SPECULATIVE["linear"]
    mixed = MIXED | {"repetition_penalty": [1.5, 1.3, 1.0], "max_new": 17}
    want = ip.generate(model, PARAMS, prompts, **options, **mixed)
    for name, draft in drafts(PARAMS).items():
        out = speculated(model, 4, draft, prompts, **options, **mixed)
        assert out.tokens == want.tokens, name
    assert want.tokens[0] != plain("linear").tokens[0]


def test_a_draft_with_a_shorter_context_serves_texts_that_fit_it() -> None:
    """What does not fit the draft is the text, not the state's length rounded up."""
    small = dataclasses.replace(BARE.spec.config, context=48)
    draft = ip.cache_kv(bits=8)(ip.Model.of(ip.model.FAMILIES["llama"], small))
    model = ip.speculative(draft=draft, k=1)(KV8)
    params = model.convert(PARAMS, draft=PARAMS)
    with pytest.raises(PromptError):
        ip.generate(model, params, [3], max_new=60)
    assert len(ip.generate(model, params, [3], max_new=8).tokens) == 8


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "no prompt"),
        ("", "text"),
        ([[]], "prompt 0 is empty"),
        ([[1, 2], []], "prompt 1 is empty"),
        ([[1, VOCAB]], f"token {VOCAB} of prompt 0"),
        ([1, -1], "token -1 of prompt 0"),
        ([[1], [2, 10**12]], "prompt 1"),
        ("the", "without a tokenizer"),
        (["the"], "without a tokenizer"),
        ([[1, 2.5]], "prompt 0 is neither"),
        ([1, "a"], "prompt 0 is neither"),
        (np.array([[0.5, 1.0]]), "prompt 0 is neither"),
    ],
    ids=str,
)
def test_a_prompt_that_cannot_be_served_is_refused(prompts: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says) as e:
        ip.generate(CACHED, PARAMS, prompts, max_new=2)
    assert e.value.fix


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(PromptError, match="prompt 0 is empty"):
        ip.generate(SPEAKER, PARAMS, "")
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        ip.generate(SPEAKER, PARAMS, ["the", ""])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new": 0}, "max_new=0"),
        ({"max_new": -3}, "max_new=-3"),
        ({"max_new": 2.0}, "max_new=2.0"),
        ({"max_new": True}, "max_new=True"),
        ({"max_new": CONTEXT}, f"context of {CONTEXT}"),
        ({"max_new": 8, "max_len": 16}, "max_len=16"),
        ({"max_new": 8, "max_len": CONTEXT + 1}, f"context of {CONTEXT}"),
        ({"max_len": 0}, "max_len=0"),
        ({"stop": "x"}, "without a tokenizer"),
        ({"stop": [""]}, "no text"),
        ({"stop": [3]}, "no text"),
        ({"stop_tokens": [VOCAB]}, f"vocabulary of {VOCAB}"),
        ({"stop_tokens": [-1]}, f"vocabulary of {VOCAB}"),
    ],
    ids=str,
)
def test_lengths_and_stops_that_cannot_be_are_refused(options: dict, says: str) -> None:
    with pytest.raises(PromptError, match=says) as e:
        ip.generate(CACHED, PARAMS, RAGGED, **options)
    assert e.value.fix


def test_a_length_over_the_context_is_refused_with_what_fits() -> None:
    with pytest.raises(PromptError) as e:
        ip.generate(CACHED, PARAMS, [1] * 10, max_new=CONTEXT)
    assert f"max_new={CONTEXT - 10}" in e.value.fix
    with pytest.raises(PromptError) as e:
        ip.generate(CACHED, PARAMS, [1] * CONTEXT, max_new=1)
    assert "shorter prompt" in e.value.fix
    with pytest.raises(PromptError) as e:
        ip.generate(CACHED, PARAMS, [1] * 10, max_new=8, max_len=16)
    assert "max_len=18" in e.value.fix
    assert "max_new=6" in e.value.fix


def test_a_prompt_longer_than_max_len_is_not_told_to_want_fewer_than_no_tokens() -> None:
    with pytest.raises(PromptError) as e:
        ip.generate(CACHED, PARAMS, [1] * 20, max_new=4, max_len=10)
    assert "max_len=24" in e.value.fix
    assert "max_new=-" not in e.value.fix


def test_guesses_count_against_the_length() -> None:
    model = ip.speculative(draft=CACHED, k=4)(CACHED)
    params = model.convert(PARAMS, draft=PARAMS)
    with pytest.raises(PromptError, match="4 guesses") as e:
        ip.generate(model, params, [1] * 10, max_new=CONTEXT - 12)
    assert f"max_new={CONTEXT - 14}" in e.value.fix
    with pytest.raises(PromptError, match="4 guesses"):
        ip.generate(model, params, [1] * 10, max_new=8, max_len=20)


def test_options_and_params_are_checked_before_anything_runs() -> None:
    with pytest.raises(SamplingError, match="temperature"):
        ip.generate(CACHED, PARAMS, RAGGED, temperature=-1)
    with pytest.raises(SamplingError, match="seed"):
        ip.generate(CACHED, PARAMS, RAGGED, seed=[1, 2])
    with pytest.raises(SamplingError, match="seed"):
        ip.generate(CACHED, PARAMS, RAGGED, seed=None)
    with pytest.raises(ParamsError):
        ip.generate(ip.quantize(bits=8)(CACHED), PARAMS, RAGGED)
