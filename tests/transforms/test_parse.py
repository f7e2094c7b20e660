"""A stack as text: read back as it is printed, and never evaluated."""

from __future__ import annotations

import pytest

import infopt as ip
from infopt import testing
from infopt.errors import InfoptError, StackSyntaxError
from infopt.transforms.base import Transform

STACKS = [
    *testing.EXAMPLES,
    ip.quantize(bits=8) | ip.sliding_window(256, sinks=4) | ip.cache_kv(bits=8),
    ip.quantize(bits=4, group=16, where="layers.*.mlp.*") | ip.cache_kv() | ip.paged(4),
    ip.cache_kv() | ip.speculative(ip.self_draft(ip.quantize(bits=4) | ip.sliding_window(64)), k=3),
    ip.cache_kv() | ip.speculative(ip.self_draft()),
    ip.compose(*testing.EXAMPLES),
]


@pytest.mark.parametrize("transform", STACKS, ids=repr)
def test_a_stack_is_read_back_as_it_is_printed(transform: Transform) -> None:
    assert ip.parse_stack(repr(transform)).steps == transform.steps
    assert repr(ip.parse_stack(repr(transform))) == repr(transform)
    if transform.steps == (transform,):
        assert ip.parse_stack(repr(transform)) == transform


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", ip.compose()),
        ("  \n ", ip.compose()),
        (" quantize( bits = 8 )|cache_kv() ", ip.quantize(bits=8) | ip.cache_kv()),
        ("gqa(1) | (cache_kv() | paged(4))", ip.gqa(1) | ip.cache_kv() | ip.paged(4)),
        ("sliding_window(8, 2, [0, 1])", ip.sliding_window(8, 2, [0, 1])),
        ("sliding_window(8, layers=(0,))", ip.sliding_window(8, layers=[0])),
        ("cache_kv(bits=None)", ip.cache_kv()),
        ('quantize(where="head")', ip.quantize(where="head")),
        ("speculative(draft=self_draft(quantize(bits=4)))", ip.speculative(ip.self_draft(ip.quantize(bits=4)))),
    ],
)
def test_arguments_stand_in_any_form_that_python_allows(text: str, want: Transform) -> None:
    assert ip.parse_stack(text) == want


CODE = [
    "__import__('os').system('true')",
    "__import__('os')",
    "quantize(bits=__import__('os'))",
    "quantize(bits=8).edit",
    "ip.quantize(bits=8)",
    "quantize.__globals__['os']",
    "(lambda: cache_kv())()",
    "quantize(bits=(lambda: 8)())",
    "quantize(bits=[b for b in (4, 8)][1])",
    "[cache_kv() for _ in range(3)]",
    "quantize(where=f'layers.{0}')",
    "quantize(bits=2**3)",
    "quantize(bits=4 if True else 8)",
    "quantize(bits=(b := 8))",
    "quantize(bits=eight)",
    "quantize(bits=4 + 4)",
    "quantize(*(8,))",
    "quantize(**{'bits': 8})",
    "sliding_window(8, layers=range(3))",
    "quantize(bits=8) or cache_kv()",
    "quantize(bits=8) + cache_kv()",
    "quantize(bits=8) & cache_kv()",
    "not cache_kv()",
    "cache_kv",
    "quantize(bits=8) | cache_kv",
    "open('/etc/passwd')",
    "eval('1')",
    "print(cache_kv())",
    "await cache_kv()",
    "compose(cache_kv())()",
]


@pytest.mark.parametrize("text", CODE)
def test_code_in_the_text_is_refused(text: str) -> None:
    with pytest.raises(StackSyntaxError) as e:
        ip.parse_stack(text)
    assert e.value.fix


@pytest.mark.parametrize(
    "text",
    [
        "quantize(",
        "quantize(bits=8) |",
        "| cache_kv()",
        "quantize(bits=8) cache_kv()",
        "quantize(bits=8); cache_kv()",
        "import os",
        "x = cache_kv()",
        "quantize(bits=8)\ncache_kv()",
        "cache_kv(bits=08)",
        "cache_kv()\0",
        "quantize(bits=8, bits=4)",
        "'cache_kv()'",
        "3",
        "None",
        "self_draft()",
        "cache_kv() | 3",
        "cache_kv() | self_draft()",
        "# cache_kv()",
    ],
)
def test_what_is_no_stack_is_refused(text: str) -> None:
    with pytest.raises(StackSyntaxError) as e:
        ip.parse_stack(text)
    assert e.value.fix


BOMBS = {
    "parentheses": "(" * 900 + "cache_kv()" + ")" * 900,
    "brackets": "quantize(bits=" + "[" * 900 + "]" * 900 + ")",
    "drafts": "self_draft(" * 90 + ")" * 90,
    "signs": "quantize(bits=" + "-" * 1900 + "8)",
    "nots": "quantize(bits=" + "not " * 450 + "8)",
    "sum": "quantize(bits=" + "1+" * 900 + "1)",
    "calls": "cache_kv" + "()" * 900,
    "attributes": "cache_kv()" + ".a" * 900,
    "subscripts": "quantize(bits=a" + "[0]" * 600 + ")",
    "bars": "cache_kv()" + " | gqa(1)" * 200,
    "powers": "quantize(bits=9**9**9**9**9)",
    "digits": "gqa(" + "9" * 1900 + ")",
    "long": "cache_kv()" + " " * 3000 + "| gqa(1)",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_or_read_and_nothing_else(name: str) -> None:
    """Never a RecursionError, never a hang."""
    try:
        read = ip.parse_stack(BOMBS[name])
    except InfoptError as e:
        assert e.what
        assert len(str(e)) < 5000
    else:
        assert isinstance(read, Transform)


def test_a_long_text_is_refused() -> None:
    with pytest.raises(StackSyntaxError, match="2011 characters"):
        ip.parse_stack("cache_kv()" + " " * 2000 + "|")


@pytest.mark.parametrize(
    ("text", "near"),
    [("quantise(bits=8)", "quantize"), ("cache(bits=8)", "cache_kv"), ("window(8)", "sliding_window"), ("xy()", "gqa")],
)
def test_an_unknown_name_gets_a_suggestion(text: str, near: str) -> None:
    with pytest.raises(StackSyntaxError, match="is not a transform") as e:
        ip.parse_stack(text)
    assert near in e.value.fix


@pytest.mark.parametrize(
    ("text", "signature"),
    [
        ("quantize(bitz=8)", "quantize(bits, group, where, format, clip, pad, method, activations, static)"),
        ("gqa()", "gqa(kv_heads, init, seed)"),
        ("gqa(1, 2, 3, 4)", "gqa(kv_heads, init, seed)"),
        ("quantize(8, bits=8)", "quantize(bits, group, where, format, clip, pad, method, activations, static)"),
        ("sliding_window()", "sliding_window(size, sinks, layers)"),
        ("dequantize(1)", "dequantize()"),
    ],
)
def test_a_wrong_argument_is_shown_the_signature(text: str, signature: str) -> None:
    with pytest.raises(StackSyntaxError) as e:
        ip.parse_stack(text)
    assert e.value.what.startswith(text.split("(")[0] + ": ")
    assert e.value.fix == signature


@pytest.mark.parametrize(
    "text",
    [
        "quantize(bits=7)",
        "quantize(format='int7')",
        "quantize(where={'*': [8]})",
        "quantize(where={3: 8})",
        "quantize(bits='8')",
        "quantize(bits=cache_kv())",
        "quantize(bits=1e999)",
        "quantize(bits=[8])",
        "quantize(bits={})",
        "quantize(group={1, 2})",
        "gqa(-1)",
        "gqa(True)",
        "paged('x')",
        "sliding_window(4, sinks=9)",
        "sliding_window(4, layers=5)",
        "sliding_window(4, layers='ab')",
        "speculative(cache_kv())",
        "speculative(self_draft(3))",
        "cache_kv(bits=cache_kv())",
    ],
)
def test_arguments_of_the_wrong_sort_are_refused_by_a_library_error(text: str) -> None:
    with pytest.raises(InfoptError) as e:
        ip.parse_stack(text)
    assert e.value.fix


def test_an_error_is_its_what_why_and_fix_lines() -> None:
    with pytest.raises(StackSyntaxError) as e:
        ip.parse_stack("quantise(bits=8)")
    assert str(e.value) == (
        "'quantise' is not a transform.\n"
        "  why: a stack's text calls only the factories that are known by name.\n"
        "  fix: did you mean 'quantize' or 'dequantize'?"
    )
    assert e.value.one_line == (
        "'quantise' is not a transform; why: a stack's text calls only the factories that are known by name; "
        "fix: did you mean 'quantize' or 'dequantize'?"
    )
