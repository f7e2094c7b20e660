"""Chat templates: messages to the text that a model was trained on, as `transformers` renders it, by untrusted text.

Two things guard us. jinja2's sandbox keeps a template from running code. It does not keep one from running for ever,
or from filling the memory (`'a' * 10**9`; a list that holds a list twice, forty times over), so here all that makes a
value or repeats something is metered: the tree is rewritten so that loops, literals and `~` pass by the meter, and
operators, filters and calls are the environment's own. Each value is bounded, so each single step is.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from infopt.errors import CheckpointError, PromptError

MAX_SOURCE = 1 << 16
"""Characters of a template. Those in use have up to 20,000."""
MAX_VALUE = 1 << 20
"""Characters and elements of one value, beside those of the messages themselves."""
MAX_WORK = 1 << 23
"""Characters and elements made or passed on in one rendering; and 32 times those of the messages."""
MAX_SECONDS = 2.0
STEP = 32  # what a turn of a loop or a call costs beside its text
MAX_BITS = 4096  # of a whole number

FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format", "groupby",
    "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper",
    "wordcount",
)  # fmt: skip
"""Those of jinja2 whose cost follows from the size of what goes in and comes out; and `tojson`, our own."""
METHODS: dict[type, tuple[str, ...]] = {
    str: (
        "capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha",
        "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "ljust",
        "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust",
        "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
        "zfill",
    ),
    dict: ("copy", "get", "items", "keys", "values"),
    list: ("copy", "count", "index"),
    tuple: ("count", "index"),
    int: (), float: (), bytes: (),
}  # fmt: skip
_WIDE = re.compile(r"\d{4}|\*|\{[^{}]*\{")  # a width of a format that is large, or given apart from it


class _Spent(Exception):
    """A template wants more than it may have."""


class _Raised(jinja2.TemplateError):
    """`raise_exception` was called."""


def _size(value: Any, limit: float = float("inf")) -> int:
    """Characters and elements of a value as a tree, and so at least about what printing or comparing it costs."""
    total, stack = 0, [value]
    while stack and total <= limit:
        x = stack.pop()
        if isinstance(x, str | bytes):
            total += 1 + len(x)
        elif isinstance(x, Mapping):
            total += 1 + len(x)
            stack += x.keys()
            stack += x.values()
        elif isinstance(x, list | tuple | set | frozenset | collections.abc.MappingView):
            total += 1 + len(x)
            stack.extend(iter(cast(Any, x)))
        else:
            total += 1
    return total


class _Meter:
    def __init__(self, given: int) -> None:
        self.value = MAX_VALUE + given
        self.left = MAX_WORK + 32 * given
        self.deadline = time.monotonic() + MAX_SECONDS

    def charge(self, n: int) -> None:
        self.left -= n
        if n > self.value or self.left < 0:
            raise _Spent("it makes more text than a conversation needs")
        if time.monotonic() > self.deadline:
            raise _Spent(f"it takes more than {MAX_SECONDS:g} seconds")

    def check(self, value: Any) -> Any:
        """The value, paid for; an iterator pays as it goes."""
        self.charge(_size(value, self.value))
        if isinstance(value, collections.abc.Iterator) and not isinstance(value, jinja2.runtime.LoopContext):
            return map(self.check, value)
        return value

    def format(self, text: str, args: Any) -> None:
        if _WIDE.search(text):
            raise _Spent("it pads to a width of more than 999 characters")
        self.charge((text.count("%") + text.count("{")) * _size(args))

    def before(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse what would grow beyond measure, where the result's size does not follow from the arguments' sizes."""
        values = [*args, *kwargs.values()]
        self.charge(_size(values, self.value))
        text = values[0] if values and isinstance(values[0], str) else ""
        lengths = [len(v) for v in values if isinstance(v, str)]
        if name == "join":  # a text between the elements of a list, whichever of the two comes first
            places = max((len(v) for v in values if isinstance(v, collections.abc.Sized) and v is not text), default=0)
            self.charge(max(places, len(text) if len(lengths) > 1 else 0) * max(lengths, default=0))
        elif name == "replace" and len(values) > 2:
            old = values[1] if isinstance(values[1], str) else str(values[1])
            self.charge((text.count(old)) * max(lengths))
        elif name in ("center", "ljust", "rjust", "zfill", "indent"):
            lines = text.count("\n") + 1 if name == "indent" else 1
            widths = [v if isinstance(v, int) else len(v) for v in values[1:] if isinstance(v, int | str)]
            self.charge(lines * max(widths, default=0))
        elif name == "format":
            self.format(text, values[1:])


class _Namespace(Namespace):
    """`namespace()`, whose attributes do not begin with a low line, and whose text does not show what it holds."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a namespace cannot hold {name!r}")
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said, for training; here it only marks a scope."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # or constants are computed before anything is metered
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=jinja2.pass_context(lambda context, value: self.meter.check(value)),
        )
        self.meter = _Meter(0)
        self.macro_weight = 0
        self.filters = {name: self._metered(name, self.filters[name]) for name in FILTERS}
        self.filters |= {"tojson": self._tojson, "_check": lambda x: self.meter.check(x), "_loop": self._loop}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": self._strftime_now,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
        }

    def _metered(self, name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(filter_, "jinja_pass_arg") else 0  # its context comes before its arguments

        @functools.wraps(filter_)
        def metered(*args: Any, **kwargs: Any) -> Any:
            args = _listed(name, args)
            self.meter.before(name, args[first:], kwargs)
            return self.meter.check(filter_(*args, **kwargs))

        return metered

    def _loop(self, iterable: Any, weight: int) -> Iterator[Any]:
        for x in iterable:
            self.meter.charge(weight)
            yield x

    def _tojson(
        self, x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """As `transformers`': jinja2's own escapes what is special in HTML."""
        if _size([indent, separators]) > 100 or (isinstance(indent, int) and indent > 100):
            raise _Spent("it pads to a width of more than 100 characters")
        self.meter.charge(_size(x, self.meter.value))
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        parts = []
        for part in encoder.iterencode(x):
            self.meter.charge(len(part))
            parts.append(part)
        return "".join(parts)

    def _strftime_now(self, form: str) -> str:
        self.meter.format(form, [])
        return datetime.now().strftime(form)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        if operator == "*":
            for x, n in ((left, right), (right, left)):
                if isinstance(x, str | bytes | list | tuple) and isinstance(n, int):
                    meter.charge(_size(x, meter.value) * max(n, 0))
        elif operator == "%" and isinstance(left, str):
            meter.format(left, right)
        elif operator == "+":
            meter.charge(_size([left, right], meter.value))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise _Spent(f"it computes with numbers of more than {MAX_BITS} bits")
        return meter.check(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        known = next((methods for kind, methods in METHODS.items() if isinstance(obj, kind)), None)
        return known is None or attr in known

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        bound = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # str.format comes wrapped
        name = getattr(obj, "__name__", "")
        self.meter.charge(STEP)
        args = _listed(name, args)
        self.meter.before(name, [bound, *args] if isinstance(bound, str) else args, kwargs)
        if isinstance(obj, jinja2.runtime.Macro):
            self.meter.charge(self.macro_weight)
        return self.meter.check(super().call(context, obj, *args, **kwargs))

    def compile_metered(self, source: str) -> jinja2.Template:
        """A template whose loops, literals and joins pass by the meter."""
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                raise jinja2.TemplateError("a recursive loop is not rendered")
            loop.iter = self._filter(loop.iter, "_loop", nodes.Const(_weight(loop)))
        macros = [*tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock)]
        self.macro_weight = max(map(_weight, macros), default=0)
        self._rewrite(tree)
        return self.from_string(tree)

    def _filter(self, node: Any, name: str, *args: nodes.Expr) -> Any:
        new = nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)
        return new.set_environment(self)

    def _rewrite(self, node: nodes.Node) -> None:
        for field, value in node.iter_fields():
            if isinstance(value, list):
                value[:] = [self._rewritten(v) if isinstance(v, nodes.Node) else v for v in value]
            elif isinstance(value, nodes.Node):
                setattr(node, field, self._rewritten(value))

    def _rewritten(self, node: nodes.Node) -> nodes.Node:
        self._rewrite(node)
        if isinstance(node, nodes.Concat):
            return self._filter(nodes.List(node.nodes, lineno=node.lineno).set_environment(self), "join")
        if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            return self._filter(node, "_check")
        return node


def _weight(node: nodes.Node) -> int:
    """What the text within a node costs each time that it is put out."""
    return STEP + sum(len(n.data) for n in node.find_all(nodes.TemplateData))


def _listed(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a join, which must be counted before they are joined."""
    return tuple(list(a) if isinstance(a, collections.abc.Iterator) else a for a in args) if name == "join" else args


def _raise(message: Any) -> None:
    raise _Raised(str(message))


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """How a model's conversations are written. Nothing is compiled, and nothing refused, before it is used.

    Args:
      source: the template.
      tool_use: another one for when there are tools, or None.
      special: names of special tokens and their text, as `bos_token`; templates use them.
      where: what error messages call the file.

    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "Hello"}])
    '<user>Hello'
    """

    source: str
    tool_use: str | None = None
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    where: str = "the model"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation.

        Args:
          messages: each a mapping with `role` and what else the template reads, `content` above all.
          tools: JSON schemas of functions, for templates that tell the model of them.
          add_generation_prompt: whether the text ends where the assistant's answer begins.

        Raises:
          PromptError: messages are not what they should be, or the template refuses them, fails, or wants too much.
        """
        if not isinstance(messages, list | tuple) or not messages or not all(isinstance(m, Mapping) for m in messages):
            raise PromptError(
                "the messages are not a list of at least one message.",
                why="a template goes through messages, each a mapping.",
                fix='[{"role": "user", "content": "Hello"}], say',
            )
        # Without what is None, as in transformers: templates ask whether a key is there.
        plain = [{k: _plain(v) for k, v in m.items() if v is not None} for m in messages]
        schemas = None if tools is None else [_plain(tool) for tool in tools]
        source = self.tool_use if tools and self.tool_use is not None else self.source
        try:
            template = _compiled(source)
            return template.render(
                {**self.special, "messages": plain, "tools": schemas, "add_generation_prompt": add_generation_prompt}
            )
        except _Raised as error:
            raise PromptError(
                f"the chat template of {self.where} refuses these messages.",
                why=str(error)[:500] or "it does not say.",
                fix="messages in the order and the roles that this model was trained on",
            ) from error
        except _Spent as error:
            raise PromptError(
                f"the chat template of {self.where} was stopped.",
                why=f"{error}, and it comes from a file that nobody vouches for.",
                fix="a model of another source, or a template of your own",
            ) from error
        except Exception as error:  # whatever a foreign template can make jinja2 or Python say
            raise PromptError(
                f"the chat template of {self.where} cannot be rendered.",
                why=f"{type(error).__name__}: {str(error)[:500]}",
                fix="messages with 'role' and 'content' as texts; else the template is damaged: fetch the model again",
            ) from error


class _Template:
    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise _Spent(f"it has {len(source)} characters, more than {MAX_SOURCE}")
        self._environment = _Environment()
        self._template = self._environment.compile_metered(source)
        self._lock = threading.Lock()  # one meter an environment

    def render(self, values: dict[str, Any]) -> str:
        with self._lock:
            self._environment.meter = _Meter(_size(values))
            return "".join(self._template.generate(values))


def no_template() -> PromptError:
    """What is said of a model that has none."""
    return PromptError(
        "this model has no chat template.",
        why="only that says how the model was trained to read a conversation, and most base models were not.",
        fix="a model made for chats, often named Instruct or Chat; generate(...) continues plain text",
    )


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> _Template:
    return _Template(source)


def _plain(value: Any, depth: int = 0) -> Any:
    """What JSON can say, and nothing with methods of its own."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if depth < 50 and isinstance(value, Mapping):
        return {str(k): _plain(v, depth + 1) for k, v in value.items()}
    if depth < 50 and isinstance(value, list | tuple):
        return [_plain(v, depth + 1) for v in value]
    raise PromptError(
        f"a message or tool holds a {type(value).__name__}" + " nested more than 50 deep" * (depth >= 50) + ".",
        why="a template comes from the model's file, and gets plain data only.",
        fix="texts, numbers, lists and mappings",
    )


def read_template(value: Any, special: Mapping[str, str], where: str) -> ChatTemplate | None:
    """The template that a file gives: a text, or several by name.

    Raises:
      CheckpointError: it is neither.
    """
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(v, dict) for v in value):
        value = {str(v.get("name")): v.get("template") for v in value}
    if isinstance(value, str):
        value = {"default": value}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()) or "default" not in value:
        raise CheckpointError(
            f"{where} has a chat template that is not a text.",
            why="it is a text, or several by name, one of them 'default'.",
            fix="fetch the model again",
        )
    return ChatTemplate(value["default"], value.get("tool_use"), dict(special), where)
