"""The errors that reach a user, and the words that their messages share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class ArcmergeError(Exception):
    """An error that the user can mend.

    Args:
        problems: one message, or several, each in one line and in the form `'name' must RULE, got VALUE; ADVICE`.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class MissingPackage(ArcmergeError, ImportError):
    """An optional package that a part of arcmerge needs cannot be imported."""


@contextmanager
def needed(package: str, by: str, extra: str, module: str = "") -> Iterator[None]:
    """Surrounds the imports of an optional package.

    Args:
        package: the name of the package.
        by: the part of arcmerge that needs it, for the message.
        extra: the extra of arcmerge that installs it.
        module: the `__name__` of the importing module. If it was called as a command, it ends with the message.

    Raises:
        MissingPackage: if the package cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        found, command = (
            ("no such package", "install") if absent else (f"an import error ({error})", "install --upgrade")
        )
        missing = MissingPackage(
            f"'{package}' must be installed for {by}, got {found}; pip {command} 'arcmerge[{extra}]'"
        )
        if module == "__main__":
            raise SystemExit(f"arcmerge: {missing}") from None
        raise missing from error


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
