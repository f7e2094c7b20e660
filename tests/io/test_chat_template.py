"""Chat templates against transformers, where they come from, and templates that mean harm."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from infopt.errors import CheckpointError, PromptError
from infopt.io import gguf, huggingface
from infopt.io.chat_template import MAX_SECONDS, MAX_SOURCE, ChatTemplate, read_template
from infopt.io.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOLDENS = json.loads((FIXTURES / "chat_goldens.json").read_text())
HELLO = [{"role": "user", "content": "Hello"}]
SIMPLE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Path) -> Tokenizer:
    read = gguf.open_checkpoint(smollm2, "float32").tokenizer
    assert read is not None
    return read


# ----------------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("row", GOLDENS["rows"], ids=[f"{r['template']}-{i}" for i, r in enumerate(GOLDENS["rows"])])
def test_texts_equal_transformers(row: dict[str, Any], request: pytest.FixtureRequest) -> None:
    if row["template"] == "smollm2":
        template = request.getfixturevalue("smollm2_tokenizer").template
    else:
        template = ChatTemplate(GOLDENS["templates"][row["template"]], None, GOLDENS["special"])
    arguments = row["messages"], row["tools"], row["add_generation_prompt"]
    if "error" in row:
        with pytest.raises(PromptError) as caught:
            template.render(*arguments)
        assert row["error"] in caught.value.why
    else:
        assert template.render(*arguments) == row["text"]


def test_tokens_equal_transformers_and_a_typed_special_token_is_that_token(smollm2_tokenizer: Tokenizer) -> None:
    rows = [row for row in GOLDENS["rows"] if "ids" in row]
    for row in rows:
        text = smollm2_tokenizer.chat(row["messages"], row["tools"], row["add_generation_prompt"])
        assert smollm2_tokenizer.encode(text, special=False) == row["ids"]
    assert any("<|im_end|>" in message["content"] for row in rows for message in row["messages"] if message["content"])


def test_the_text_of_a_chat_gets_no_second_start_of_text() -> None:
    tokenizer = Tokenizer.from_tables(["a", "b", "<s>"], [], [1, 1, 3], "gpt-2", bos=2)
    assert tokenizer.encode("ab") == [2, 0, 1]
    assert tokenizer.encode("<s>ab", special=False) == [2, 0, 1]


# ------------------------------------------------------------------------------------------------- where they are read


def folder(tmp_path: Path, config: Any = None, **files: str) -> Path:
    tokenizer = Tokenizer.from_tables(["a", "<s>"], [], [1, 3], "gpt-2")
    shutil.copytree(FIXTURES / "llama", tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(tokenizer.backend.to_str())
    if config is not None:
        (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        path = tmp_path / "m" / (name.replace("__", "/") + ".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path / "m"


def read(path: Path) -> Tokenizer:
    tokenizer = huggingface.open_checkpoint(path, "float32").tokenizer
    assert tokenizer is not None
    return tokenizer


def test_a_folders_template_is_read_from_tokenizer_config_with_its_special_tokens(tmp_path: Path) -> None:
    config = {"chat_template": "{{ bos_token }}{{ eos_token }}", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    assert read(folder(tmp_path, config)).chat(HELLO) == "<s></s>"


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    path = folder(tmp_path, {"chat_template": "old"}, chat_template="new", additional_chat_templates__tool_use="tools")
    assert read(path).chat(HELLO) == "new"
    assert read(path).chat(HELLO, tools=[{"name": "f"}]) == "tools"


def test_a_folder_with_a_template_for_tools_alone_loads_and_has_none(tmp_path: Path) -> None:
    path = folder(tmp_path, {"chat_template": "old"}, additional_chat_templates__tool_use="tools")
    assert read(path).template is None


def test_templates_by_name_are_chosen_by_whether_there_are_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    tokenizer = read(folder(tmp_path, {"chat_template": named}))
    assert (tokenizer.chat(HELLO), tokenizer.chat(HELLO, tools=[{"name": "f"}])) == ("plain", "1")


@pytest.mark.parametrize("value", [7, {"a": "b"}, {"default": 7}, ["x"]], ids=str)
def test_a_template_that_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="not a text"):
        read_template(value, {}, "m")


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(PromptError, match="no chat template"):
        Tokenizer.from_tables(["a"], [], [1], "gpt-2").chat(HELLO)


def test_a_template_does_not_change_which_tokenizers_are_equal(smollm2_tokenizer: Tokenizer) -> None:
    bare = Tokenizer(smollm2_tokenizer.backend)
    assert bare.template is None and bare == smollm2_tokenizer and bare.digest == smollm2_tokenizer.digest


# ------------------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize("messages", [[], "Hello", [7], None, {"role": "user"}], ids=str)
def test_what_is_no_list_of_messages_is_refused(messages: Any) -> None:
    with pytest.raises(PromptError, match="not a list of at least one message"):
        ChatTemplate(SIMPLE).render(messages)


def test_an_object_in_a_message_is_refused() -> None:
    nested: Any = "x"
    for _ in range(60):
        nested = [nested]
    for content, named in ((object(), "holds a object"), (nested, "more than 50 deep")):
        with pytest.raises(PromptError, match=named):
            ChatTemplate(SIMPLE).render([{"role": "user", "content": content}])


def test_what_is_in_a_message_is_not_taken_for_a_template() -> None:
    text = "{{ 7 * 7 }}{% raw %}<b>&amp;"
    assert ChatTemplate(SIMPLE).render([{"role": "user", "content": text}]) == f"<user>{text}"


def test_a_long_conversation_fits_the_budget() -> None:
    messages = [{"role": "user", "content": "word " * 20000}, {"role": "assistant", "content": "x"}] * 20
    trimmed = ChatTemplate("{% for m in messages %}{{ '[' + m['content'] | trim + ']' }}{% endfor %}")
    assert len(trimmed.render(messages)) > 1_900_000


# ------------------------------------------------------------------------------------------------------------- hostile

DOUBLED = (
    "{{% set ns = namespace(a={0}) %}}{{% for i in range(60) %}}{{% set ns.a = {1} %}}{{% endfor %}}{{{{ ns.a }}}}"
)
HOSTILE = {
    "code": [
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__() }}",
        "{{ 'x' | attr('__class__') }}",
        "{{ namespace(_x=1) }}",
        "{{ '{0.__class__.__mro__[1]}'.format(1) + undefined.x }}",
        "{% include '/etc/passwd' %}",
        "{% extends 'x' %}",
        "{{ lipsum(n=10) }}",
    ],
    "endless": [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
        "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ 7 ** (10 ** 9) }}",
        "{% for i in range(99999) %}{% set x = 'a' * 100000 in 'b' * 1000000 %}{% endfor %}",
    ],
    "large": [
        DOUBLED.format("'x'", "ns.a ~ ns.a"),
        DOUBLED.format("'x'", "ns.a + ns.a"),
        DOUBLED.format("'x'", "'%s%s' % (ns.a, ns.a)"),
        DOUBLED.format("'x'", "'{0}{0}'.format(ns.a)"),
        DOUBLED.format("'x'", "[ns.a, ns.a] | join"),
        DOUBLED.format("'x'", "ns.a | replace('x', 'xx')"),
        DOUBLED.format("['x']", "[ns.a, ns.a]"),
        DOUBLED.format("{'x': 1}", "{'x': ns.a, 'y': ns.a}"),
        DOUBLED.format("{'x': 1}", "dict(x=ns.a, y=ns.a)"),
        DOUBLED.format("7", "ns.a * ns.a"),
        "{{ 'a' * 10 ** 9 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 'x'.center(10 ** 9) }}",
        "{{ 'x'.zfill(10 ** 9) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=999999999) }}",
        "{{ strftime_now('%999999999Y') }}",
        "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
        "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
        "{{ range(90000) | map('string') | join('a' * 100000) }}",
        "{{ ('a' * 100000).join(range(90000) | map('string')) }}",
        "{{ range(99999) | map('default', 'a' * 100000) | join }}",
        "{{ ('a\n' * 100000) | indent(900000) }}",
        "{{ ('a\n' * 100000) | indent('x' * 900000) }}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{{ 1 | int.to_bytes }}{{ (1).to_bytes(10 ** 9) }}",
        "{% for i in range(99999) %}" + "y" * 60000 + "{% endfor %}",
        "{% macro m() %}" + "y" * 60000 + "{% endmacro %}{% for i in range(99999) %}{{ m() }}{% endfor %}",
        "x" * (MAX_SOURCE + 1),
    ],
    "broken": ["{% for x in", "{{", "{{ messages[0].content.x.y }}", "{{ 1 / 0 }}", "{{ " + "(" * 30000, "{% x %}",
               "{{ a" + ".b" * 20000 + " }}", "{{ 'a' | nofilter }}", "{{ messages() }}", "{% break %}"],
}  # fmt: skip


@pytest.mark.parametrize("kind, source", [(k, s) for k, v in HOSTILE.items() for s in v], ids=lambda x: x[:60])
def test_a_hostile_template_costs_an_error_and_little_time_and_memory(kind: str, source: str) -> None:
    tracemalloc.start()
    try:
        began = time.perf_counter()
        with pytest.raises(PromptError) as caught:
            ChatTemplate(source).render(HELLO)
        seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64e6 and seconds < 5 * MAX_SECONDS + 5  # tracing slows it down
    assert len(caught.value.one_line) < 1000
    assert "stopped" in caught.value.what or kind != "large" or "to_bytes" in source


def test_a_refusal_gives_the_templates_own_words() -> None:
    with pytest.raises(PromptError) as caught:
        ChatTemplate("{{ raise_exception('roles must alternate') }}", where="m.gguf").render(HELLO)
    assert (caught.value.what, caught.value.why) == (
        "the chat template of m.gguf refuses these messages.",
        "roles must alternate",
    )


def test_a_namespace_does_not_show_what_it_holds() -> None:
    assert ChatTemplate("{% set ns = namespace(a=1) %}{% set ns.b = ns %}{{ ns.b.a }}{{ ns }}").render(HELLO) == (
        "1<namespace>"
    )


def test_one_template_is_rendered_by_several_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    template = ChatTemplate(SIMPLE)
    texts = [[{"role": "user", "content": str(i)}] for i in range(50)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(template.render, texts)) == [f"<user>{i}" for i in range(50)]
