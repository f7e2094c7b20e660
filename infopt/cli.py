"""The command line: `generate`, `chat`, `pull`, `list`, `show`, `rm`, `families`, `plan`, `audit`, `matrix`, `bench`.

JAX and the rest of the library are imported inside the commands, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn

from infopt.errors import InfoptError
from infopt.interrupts import heard_by

if TYPE_CHECKING:
    from infopt.generation import Chunk, Generation

START = time.perf_counter()
USAGE, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # exit codes; the last two as a shell reports SIGINT and SIGPIPE

GENERATE_EXAMPLES = """\
examples:
  infopt generate smollm2-135m "The history of the steam engine begins in the first century, when"
  infopt generate smollm2-135m "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
  infopt generate smollm2-135m "Dear Sir," --stack "quantize(bits=8) | sliding_window(256, sinks=4) | cache_kv(bits=8)"
  infopt generate ./model.gguf - --dtype keep --max-new 256 < prompt.txt
"""
CHAT_EXAMPLES = """\
examples:
  infopt chat smollm2-135m
  infopt chat smollm2-135m --stack "quantize(bits=8) | cache_kv()" --system "Answer in one sentence."
"""
LIBRARY_EXAMPLES = """\
NAME is one of infopt's own (smollm2-135m), hf:owner/name, hf:owner/name@revision, hf:owner/name:file.gguf, or an alias
from models.toml.
"""
PLAN_EXAMPLES = """\
examples:
  infopt plan                                                 what can I run on this machine?
  infopt plan --device rtx4090,m3-max:36 --context 32768      and on those?
  infopt plan smollm2-135m --context 8192 --batch 16 --device h100,a100,rtx4090,m3-max,cpu
  infopt plan ./model.gguf --dtype keep --stack "sliding_window(1024, sinks=4) | cache_kv(bits=8)"
"""
AUDIT_EXAMPLES = """\
examples:
  infopt audit smollm2-135m --stack "quantize(format='nf4', where='*.mlp.*')"
  infopt audit smollm2-135m --stack "quantize(where={'embed': 8, '*.mlp.*': 4, '*': None})"
  infopt audit ./saved-stack --json
"""
MATRIX_EXAMPLES = """\
examples:
  infopt matrix                                               every pair of transforms, on Llama and Gemma 3
  infopt matrix --family llama --depth 3 --processes 2        every triple too
  infopt matrix --processes 2 --write docs/composition.md     what the documentation holds; --check compares
"""
ABLATE_EXAMPLES = """\
examples:
  infopt ablate                                               the standard table, on the embedded model
  infopt ablate smollm2-135m --out report/                    its rows are kept: a run that is stopped goes on
  infopt ablate tiny --stack "quantize(bits=4, group=32) | cache_kv(bits=8)" --stack "8 bits=quantize(bits=8)"
  infopt ablate tiny --tradeoffs                              each transform alone: speed, quality, memory
  infopt ablate --study study.toml --out report/              models, texts and grids of stacks, out of a file
"""
BENCH_EXAMPLES = """\
examples:
  infopt bench generate
  infopt bench generate --model ./model.gguf --repeats 9
  infopt bench attention
  infopt bench methods --stack "quantize(bits=4, group=32, method='gptq')"
  infopt bench tpu --out docs/tpu.json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments after the program's name; those of the process by default.

    Returns:
      The exit code: 0, 1 (a check failed), 2 (the caller is wrong, in one line on stderr), 130 (Ctrl-C) or 141 (whoever
      read the output went away).
    """
    try:
        args = _parser().parse_args(argv)
        code = args.command(args)
        sys.stdout.flush()
        return code
    except InfoptError as error:
        return _fail(error.one_line)
    except BrokenPipeError:
        # What is still buffered must not raise again when the interpreter closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


def _fail(message: str) -> int:
    print(f"infopt: {message}", file=sys.stderr)
    return USAGE


def _version() -> str:
    def of(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    python = ".".join(map(str, sys.version_info[:3]))
    return f"infopt {of('infopt')} (jax {of('jax')}, jaxlib {of('jaxlib')}, Python {python})"


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an option, as all errors here."""

    def error(self, message: str) -> NoReturn:
        raise InfoptError(message, why="the command does not take it.", fix=f"see {self.prog} --help")


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="infopt",
        description="Composable inference transforms for JAX: each stacks with each other, and says if it is exact.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_generate(commands)
    _add_chat(commands)
    _add_library(commands)
    _add_plan(commands)
    _add_audit(commands)
    _add_matrix(commands)
    _add_ablate(commands)
    _add_bench(commands)
    return parser


def _command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_model(parser: argparse.ArgumentParser, max_new: int) -> None:
    """What model answers, and how: the same for all commands that generate."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name (smollm2-135m, hf:owner/name, an alias), a .gguf file, a Hugging Face folder or a saved stack",
    )
    parser.add_argument(
        "--stack",
        metavar="TEXT",
        help="transforms, the first one applied first, with | between; none for the bare model "
        "(default: cache_kv(), if the model has no cache yet)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16", "keep"],
        help="of the weights (default: %(default)s); keep leaves a file's 4-bit and 8-bit blocks packed",
    )
    parser.add_argument("--max-len", type=int, metavar="N", help="positions in the cache (default: what is needed)")

    group = parser.add_argument_group("sampling, in the order in which they act")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is none (default)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default)")
    group.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="keep the N likeliest tokens; 0 is all (default)"
    )
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="keep a mass of X, in (0, 1]; 1 is all (default)"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="drop what is under X of the likeliest (default 0)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same text (default 0)")

    group = parser.add_argument_group("when to stop")
    group.add_argument(
        "-n", "--max-new", type=int, default=max_new, metavar="N", help="at most N tokens (default: %(default)s)"
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; may be repeated")


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", "continue a prompt", GENERATE_EXAMPLES)
    parser.set_defaults(command=_generate)
    _add_model(parser, max_new=128)
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")

    group = parser.add_argument_group("output: text on standard output, figures on standard error")
    group.add_argument("--no-echo", action="store_true", help="leave the prompt out")
    group.add_argument("--no-stream", action="store_true", help="print the text at once, when it is done")
    group.add_argument("--no-stats", action="store_true", help="leave the line of figures out")
    group.add_argument("--json", action="store_true", help="one JSON object in place of text")
    group.add_argument("--logprobs", action="store_true", help="with --json: each token's log-probability")


def _add_chat(commands: Any) -> None:
    parser = _command(
        commands, "chat", "talk with a model; /help there lists what a line can begin with", CHAT_EXAMPLES
    )
    parser.set_defaults(command=_chat)
    _add_model(parser, max_new=512)
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: the template's own, if any)")


def _add_library(commands: Any) -> None:
    parser = _command(commands, "pull", "fetch a model, or what has changed of it since", LIBRARY_EXAMPLES)
    parser.set_defaults(command=_library, what="pull")
    parser.add_argument("names", metavar="NAME", nargs="+")
    parser = _command(commands, "list", "list the models on this machine", LIBRARY_EXAMPLES)
    parser.set_defaults(command=_library, what="list_")
    parser = _command(commands, "show", "print what a model is, without reading its weights", LIBRARY_EXAMPLES)
    parser.set_defaults(command=_library, what="show")
    parser.add_argument("name", metavar="NAME", help="a name, a .gguf file, a Hugging Face folder or a saved stack")
    parser = _command(commands, "families", "list the families that are computed, as a table", LIBRARY_EXAMPLES)
    parser.set_defaults(command=_library, what="families")
    parser = _command(commands, "rm", "delete a fetched model, and say what was freed", LIBRARY_EXAMPLES)
    parser.set_defaults(command=_library, what="rm")
    parser.add_argument("names", metavar="NAME", nargs="+")


def _add_plan(commands: Any) -> None:
    summary = "what a stack takes of a device's memory, whether it fits, and how fast it could at most be"
    parser = _command(commands, "plan", summary, PLAN_EXAMPLES)
    parser.set_defaults(command=_plan)
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="as for generate; its weights are not read (default: common sizes)"
    )
    parser.add_argument("--stack", metavar="TEXT", help="as for generate")
    parser.add_argument(
        "--context", type=int, metavar="N", help="positions a row (default: 8192, or the model's limit)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows (default: %(default)s)")
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="LIST",
        help="h100, a100, rtx4090, m3-max, tpu-v5e, ... with commas between; NAME:GB for another memory (default: cpu)",
    )
    dtypes = ["float32", "bfloat16", "float16", "keep"]
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="as for generate (default: %(default)s)")
    parser.add_argument(
        "--kv-dtype", default="float32", choices=dtypes[:3], help="of keys and values (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="JSON in place of tables")


def _add_audit(commands: Any) -> None:
    summary = "what a stack made of each matrix: rule, format, bits, bytes, error; fails where a rule was not kept"
    parser = _command(commands, "audit", summary, AUDIT_EXAMPLES)
    parser.set_defaults(command=_audit)
    parser.add_argument("model", metavar="MODEL", help="as for generate")
    parser.add_argument("--stack", metavar="TEXT", help="as for generate (default: none)")
    dtypes = ["float32", "bfloat16", "float16", "keep"]
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="as for generate (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="JSON in place of a table")


def _add_matrix(commands: Any) -> None:
    summary = "test every pair and triple of transforms: refused with a reason, or equal to its oracle"
    parser = _command(commands, "matrix", summary, MATRIX_EXAMPLES)
    parser.set_defaults(command=_matrix)
    parser.add_argument("--family", action="append", metavar="NAME", help="may be repeated (default: llama, gemma3)")
    parser.add_argument(
        "--depth",
        type=int,
        choices=[1, 2, 3],
        help="1: each alone, and a handful of pairs; 3: triples too (default: 2, of --check and --write all)",
    )
    parser.add_argument("--processes", type=_count, default=1, metavar="N", help="share the work out (default 1)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", metavar="FILE", help="write the table to FILE")
    group.add_argument(
        "--check", metavar="FILE", help="exit 1 if FILE says otherwise than was seen; --family: of some only"
    )


def _add_ablate(commands: Any) -> None:
    summary = "measure what stacks cost in quality, take in bytes and gain in speed, beside their base"
    parser = _command(commands, "ablate", summary, ABLATE_EXAMPLES)
    parser.set_defaults(command=_ablate)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for generate (default: tiny)")
    parser.add_argument(
        "--stack",
        action="append",
        metavar="[NAME=]TEXT",
        help="transforms, as for generate; may be repeated (default: the standard table's)",
    )
    parser.add_argument("--all", action="store_true", help="the standard table and more formats")
    parser.add_argument("--tradeoffs", action="store_true", help="each transform alone: speed, quality, memory")
    parser.add_argument("--study", metavar="FILE", help="a TOML file of models, texts, stacks and grids; with --out")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to measure on (default: documentation topics)")
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="score about N tokens, 0 for all (default: 12288, by a model of 10 million weights or more 10240)",
    )
    parser.add_argument(
        "--length", type=_count, metavar="N", help="tokens of a window (default: the context, at most 512)"
    )
    metrics = "ppl, kl, kl99, top1, bits_per_byte, greedy, decode"
    parser.add_argument("--metrics", metavar="LIST", help=f"of {metrics}; with commas")
    parser.add_argument("--dtype", help="of the base, as for generate (default: float32)")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals (default: %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", help="keep rows there, and the table as CSV, Markdown and a picture")
    parser.add_argument(
        "--picture",
        metavar="FILE",
        help="without --out, a PNG; '' for none (default: ablation.png)",
    )
    parser.add_argument("--json", action="store_true", help="JSON, a line a row, in place of the table")


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands, "bench", "measure speed, interleaved, and print medians; or compile for TPUs", BENCH_EXAMPLES
    )
    parser.set_defaults(command=_bench)
    parser.add_argument(
        "what",
        choices=["generate", "attention", "methods", "tpu"],
        help="generate: prefill and decode, against a yardstick; attention: its implementations, time and memory; "
        "methods: of rounding, beside a forward pass over the tokens that they read; tpu: what kernels and steps take "
        "on TPUs, without one: they are compiled, not run",
    )
    parser.add_argument(
        "--model", default="smollm2-135m", metavar="MODEL", help="of generate and methods (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=_count, default=5, metavar="N", help="a median is over N runs (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of a table")
    parser.add_argument("--stack", action="append", metavar="STACK", help="methods: only these; each has one method")
    parser.add_argument("--out", metavar="FILE", help="tpu: write JSON to FILE too")


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C comes when the block is done: within an import it would come out as another error."""
    heard: list[int] = []
    with heard_by(lambda number, frame: heard.append(number)):
        yield
    if heard:
        signal.raise_signal(signal.SIGINT)


def _prepare_jax(keep: bool = True) -> None:
    """Quiets what only JAX's own developers read; with `keep`, keeps compiled programs from one start to the next."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _interrupts_held():
        import jax

        from infopt.folders import cache_folder

    logging.getLogger("jax").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    if not keep or os.environ.get("INFOPT_COMPILE_CACHE") == "0" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _bear_any_text() -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer says what is wrong with it
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 is no reason to fail


def _generate(args: argparse.Namespace) -> int:
    if args.logprobs and not args.json:
        return _fail("--logprobs prints nothing without --json; fix: add --json")
    _bear_any_text()
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    _prepare_jax()
    import infopt as ip
    from infopt.transforms import stack_option

    stack = stack_option(args.stack)
    base, params = ip.load(args.model, dtype=args.dtype)
    if (model := stack(base)) is not base:
        params = model.convert(params)

    first: list[float] = []  # seconds to the first token
    printed = False

    def show(chunk: Chunk) -> None:
        nonlocal printed
        if not first:
            first.append(time.perf_counter() - START)
        if args.json or args.no_stream:
            return
        if not (printed or args.no_echo):
            print(prompt, end="")
        printed = True
        print(chunk.text, end="", flush=True)

    out = ip.generate(
        model,
        params,
        prompt,
        max_new=args.max_new,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        logprobs=args.logprobs,
        max_len=args.max_len,
        callback=show,
    )
    seconds = first[0] if first else time.perf_counter() - START
    if args.json:
        print(json.dumps(_record(model, prompt, out, seconds)))
        return 0
    if printed:
        print()
    else:
        print(("" if args.no_echo else prompt) + str(out.text))
    sys.stdout.flush()
    if not args.no_stats:
        print(_stats(model, out, seconds), file=sys.stderr)
    return 0


def _record(model: Any, prompt: str, out: Generation, first: float) -> dict[str, Any]:
    fields = (
        "text",
        "tokens",
        "logprobs",
        "finish",
        "tokens_per_second",
        "prefill_tokens_per_second",
        "compile_seconds",
    )
    record = {"stack": repr(model), "prompt": prompt, **{field: getattr(out, field) for field in fields}}
    if out.acceptance is not None:
        record |= {"acceptance": out.acceptance, "tokens_per_round": out.tokens_per_round}
    return record | {"first_token_seconds": round(first, 3)}


def _stats(model: Any, out: Generation, first: float) -> str:
    """One line of figures."""
    parts = [
        ", ".join(line.strip() for line in repr(model).splitlines()),
        f"{out.prompt_tokens} + {out.new_tokens} tokens",
        f"first after {first:.1f} s, {out.compile_seconds:.1f} s of them compiling",
        f"prefill {out.prefill_tokens_per_second:.1f} tokens/s",
        f"decode {out.tokens_per_second:.1f} tokens/s",
    ]
    if out.acceptance is not None:
        parts.append(f"acceptance {out.acceptance:.2f}, {out.tokens_per_round:.2f} tokens a round")
    return "; ".join(parts)


def _chat(args: argparse.Namespace) -> int:
    _bear_any_text()
    _prepare_jax()
    from infopt import chat

    return chat.main(args)


def _library(args: argparse.Namespace) -> int:
    from infopt import library

    return getattr(library, args.what)(args)


def _plan(args: argparse.Namespace) -> int:
    _prepare_jax()
    from infopt import planner

    return planner.main(args)


def _audit(args: argparse.Namespace) -> int:
    _prepare_jax()
    from infopt import audit

    return audit.main(args)


def _matrix(args: argparse.Namespace) -> int:
    _prepare_jax()
    from infopt import testing

    return testing.matrix_main(args)


def _ablate(args: argparse.Namespace) -> int:
    _prepare_jax()
    from infopt.ablation import command

    return command.main(args)


def _bench(args: argparse.Namespace) -> int:
    if args.stack and args.what != "methods":
        return _fail(f"--stack says which methods are timed, and not what of {args.what}; fix: leave it out")
    if args.what == "tpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX would use libtpu, and find no TPU
    _prepare_jax(keep=False)  # compile seconds are of a first compilation
    from infopt import tpu
    from infopt.bench import attention, generation, methods

    return {"generate": generation, "attention": attention, "methods": methods, "tpu": tpu}[args.what].main(args)


if __name__ == "__main__":
    sys.exit(main())
