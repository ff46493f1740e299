"""The scores of a sweep: each gives a model one number."""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, Protocol

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError

if TYPE_CHECKING:
    from arcmerge.gemma2.model import Gemma2


class Score(Protocol):
    """Scores a model.

    Attributes:
        title: the name in tables and plots.
        minimize: whether a lower score is better.
        identity: a text that differs between scores that are not the same; it is kept in the journal.
    """

    title: str
    minimize: bool
    identity: str

    def __call__(self, model: Gemma2) -> float: ...


class Perplexity:
    """The perplexity of texts: exp of the mean negative log-probability of all their tokens.

    Args:
        texts: the texts. Each is cut into windows.
        window: the number of tokens in a window, the BOS token in front included; None for the model's maximum.

    Raises:
        ArcmergeError: for a text without words.
    """

    minimize = True

    def __init__(self, texts: Sequence[str], window: int | None = None) -> None:
        if not all(text.strip() for text in texts):
            raise ArcmergeError("'text' must not be empty, got a text without words")
        self.texts = texts
        self.window = window
        self.title = "perplexity" + (f", windows of {window} tokens" if window else "")
        self.identity = _digest("perplexity", str(window), *texts)

    def __call__(self, model: Gemma2) -> float:
        """Every token has the same weight, whichever text it belongs to."""
        total = tokens = 0.0
        for text in self.texts:
            count = len(model.tokenizer.encode(text)) - 1
            total += count * math.log(model.perplexity(text, self.window))
            tokens += count
        return math.exp(total / tokens)


@dataclass(frozen=True)
class Question:
    """A context, the texts that may follow it, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


class MultipleChoice:
    """The accuracy on questions: how often the right choice is the most probable one, as `acc` of lm-eval."""

    title = "accuracy"
    minimize = False

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions
        self.identity = _digest("choices", *map(repr, questions))

    def __call__(self, model: Gemma2) -> float:
        limit = model.config.max_position_embeddings + 1  # no token follows the last one
        pairs = []
        for question in self.questions:
            for choice in question.choices:
                context, answer = pair = model.tokenizer.encode_pair(question.context, choice)
                if len(context) + len(answer) > limit:
                    raise ArcmergeError(
                        f"'context' and a choice must have at most {limit} tokens, the model's maximum, got "
                        f"{len(context) + len(answer)} in {question.context!r:.80}"
                    )
                pairs.append(pair)
        scores = iter([one.logprob for one in model.score(pairs)])
        right = 0
        for question in self.questions:
            found = [next(scores) for _ in question.choices]
            right += found.index(max(found)) == question.answer
        return right / len(self.questions)


class Function:
    """A function of the user that takes a Gemma2 and returns a number.

    Args:
        function: the function, or its name as "module:function". Modules in the working directory are found too. A
            sweep is resumed for a function of the same name and, if the function itself is given, the same code.
        minimize: whether a lower score is better.

    Raises:
        ArcmergeError: if the name is wrong, or the module cannot be imported.
    """

    def __init__(self, function: str | Callable[[Any], float], minimize: bool) -> None:
        self._given = function
        self._function = _function_of(function) if isinstance(function, str) else function
        if not callable(self._function):
            raise ArcmergeError(f"'function' must be a function of a model, got {self._function!r:.80}")
        if isinstance(function, str):
            self._name, code = function, ""
        else:
            self._name = (
                f"{getattr(function, '__module__', '')}:{getattr(function, '__name__', type(function).__name__)}"
            )
            code = _code_of(getattr(function, "__code__", None))
        self.title = self._name.rpartition(":")[2]
        # Two lambdas have one name, so the code of a function that is no name tells it from another.
        self.minimize, self.identity = minimize, _digest("function", self._name, *([code] if code else []))

    def __call__(self, model: Gemma2) -> float:
        """Raises ArcmergeError, with the line in the user's file, if the function raises or returns no number."""
        try:
            value = self._function(model)
        except ArcmergeError:
            raise
        except (Exception, SystemExit) as error:
            raise ArcmergeError(f"'{self._name}' must return a number, got {_raised(error)}") from error
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise ArcmergeError(f"'{self._name}' must return a number, got {value!r:.80}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """A function that was given by name is imported again in another process."""
        return Function, (self._given, self.minimize)


def _function_of(name: str) -> Callable[[Any], float]:
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ArcmergeError(f"'function' must be named module:function, got '{name}'")
    if "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ArcmergeError(f"'function' must name a module that can be imported, got '{name}': {error}") from error
    except (Exception, SystemExit) as error:
        raise ArcmergeError(f"'{name}' must be in a module that can be imported, got {_raised(error)}") from error
    if not hasattr(found, function):
        raise ArcmergeError(f"'function' must be in its module, got '{name}' and no '{function}' in {module}")
    chosen: Callable[[Any], float] = getattr(found, function)
    return chosen


def _code_of(code: Any) -> str:
    """The instructions and constants of a function, which are the same in every process."""
    if isinstance(code, frozenset):
        return " ".join(sorted(map(repr, code)))
    if not isinstance(code, CodeType):
        return "" if code is None else repr(code)
    return " ".join([code.co_code.hex(), *code.co_names, *map(_code_of, code.co_consts)])


def _raised(error: BaseException) -> str:
    """The type of an exception of a user's code, the line that raised it, and its message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename}:{frame.lineno}"
    if isinstance(error, SyntaxError):  # the import raises it, and no line of the file
        where = f"{error.filename}:{error.lineno}"
    reason = f": {error}" if str(error) else ""
    return f"{type(error).__name__} at {where}{reason}"


def read_texts(files: Sequence[Path]) -> list[str]:
    """The contents of text files in UTF-8. Raises ArcmergeError for a file that cannot be read."""
    try:
        return [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise ArcmergeError(f"'text' must be files in UTF-8 that can be read, got an error: {error}") from error


def read_questions(file: Path) -> list[Question]:
    """Questions from a file with one JSON object per line.

    Each line is `{"context": text, "choices": [texts], "answer": index of the right choice}`.
    Raises ArcmergeError for a file that cannot be read, another line, or a file without questions.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArcmergeError(f"'tasks' must be a file in UTF-8 that can be read, got an error: {error}") from error
    found = [_question(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ArcmergeError(f"'{file}' must contain questions, got none")
    return found


def _question(line: str, location: str) -> Question:
    try:
        entry = parse_object(line.encode(), Path(location))
        context, choices, answer = (entry[key] for key in ("context", "choices", "answer"))
        texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(one, str) and one for one in choices)
        if not (isinstance(context, str) and texts and type(answer) is int and 0 <= answer < len(choices)):
            raise KeyError
    except (ArcmergeError, KeyError) as error:
        raise ArcmergeError(
            f"{location}: 'question' must be "
            '{"context": text, "choices": [two texts or more, none empty], "answer": the index of the right one}'
            f", got {line:.80}"
        ) from error
    return Question(context, tuple(choices), answer)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
