"""Every error that infopt raises on purpose: what happened, why, and what to write instead."""

MOST = 1000
"""Characters of each part of a message."""


class InfoptError(ValueError):
    """The caller, a file or the environment is wrong, and this says how to go on.

    Args:
      what: one sentence, what was refused.
      why: the reason.
      fix: what to do or write instead.
    """

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        self.what, self.why, self.fix = _harmless(what), _harmless(why), _harmless(fix)
        super().__init__(f"{self.what}\n  why: {self.why}\n  fix: {self.fix}")

    @property
    def one_line(self) -> str:
        """The same on one line, for a terminal."""
        parts = (self.what, f"why: {self.why}", f"fix: {self.fix}")
        return "; ".join(" ".join(part.split()).rstrip(".") for part in parts)


def _harmless(text: str) -> str:
    """What a file is quoted with may be long, and hold what a terminal would obey."""
    text = text if len(text) <= MOST else text[: MOST - 3] + "..."
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


class TransformOrderError(InfoptError):
    """A transform cannot follow what was applied before it."""


class StackSyntaxError(InfoptError):
    """The text of a stack does not parse, or names something that is not a transform."""


class ParamsError(InfoptError):
    """Params do not fit the stack that they were given to."""


class AuditError(ParamsError):
    """A matrix is not what the rules of its stack say; `audit` is the whole table."""

    audit: object = None


class PromptError(InfoptError):
    """A prompt, its tokens or its lengths cannot be served by this model and state."""


class SamplingError(InfoptError):
    """A sampling option is outside the range where it means something."""


class EvaluationError(InfoptError):
    """A text, a model or a row of scores cannot be measured, or not be compared."""


class CheckpointError(InfoptError):
    """A model file is damaged, foreign, does not hold what its config says, or cannot be written."""


class FetchError(InfoptError):
    """A named model could not be found, fetched or kept."""


def nearest(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """`"did you mean 'quantize'? "`, or the known names where none is near."""
    import difflib

    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "known: " + ", ".join(sorted(known))


def human(size: float) -> str:
    """Bytes as a person reads them: three digits, in powers of 1000, as the hub, Ollama and the makers of disks count.

    >>> human(98_362_432), human(512), human(999_950)
    ('98.4 MB', '512 B', '1 MB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if size < 999.5:  # what rounds to 1000 is 1 of the next
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} EB"
