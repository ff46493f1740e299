"""The exceptions that reach a user."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class ArcmergeError(Exception):
    """What a user has to mend before the work can go on.

    problems: one line each, as "what must hold, which value was found, what to do".
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class MissingPackage(ArcmergeError, ImportError):
    """A package that is needed for a part of arcmerge alone cannot be imported."""


@contextmanager
def needed(package: str, by: str, extra: str, module: str = "") -> Iterator[None]:
    """For imports of a package that arcmerge is installed without.

    by: what needs it, in the sentence; extra: of arcmerge, that brings it. module: the __name__ of the module that
    imports: one that was called as a command ends the process with the sentence, as commands do.
    """
    try:
        yield
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        fault = "is not installed; pip install" if absent else f"cannot be imported ({error}); pip install --upgrade"
        sentence = f"{by} needs {package}, which {fault} 'arcmerge[{extra}]'"
        if module == "__main__":
            raise SystemExit(f"arcmerge: {sentence}") from None
        raise MissingPackage(sentence) from error


def counted(number: int, noun: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
