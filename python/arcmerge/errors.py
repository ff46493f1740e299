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


class Problems:
    """Collects problems, so that one ArcmergeError names them all."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, sentence: str, kind: str | None = None) -> None:
        """Add a problem.

        Args:
            sentence: as ArcmergeError takes it.
            kind: what equal problems of several tensors share; only the first sentence of a kind is kept, the others
                are counted.
        """
        first, times = self._found.get(kind or sentence, (sentence, 0))
        self._found[kind or sentence] = (first, times + 1)

    def sentences(self) -> list[str]:
        """One sentence a kind, in the order in which they were added."""
        return [
            sentence + (f" ({counted(times - 1, 'more tensor')} alike)" if times > 1 else "")
            for sentence, times in self._found.values()
        ]

    def raise_if_any(self) -> None:
        """Raises ArcmergeError if a problem was added."""
        if self:
            raise ArcmergeError(self.sentences())


def counted(number: int, noun: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_of(names: Sequence[str]) -> str:
    """The first name in quotes and how many follow: "'a'", "'a' and 2 more"."""
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
