"""What a sweep goes by: a number for a model, and whether less or more of it is better."""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError

if TYPE_CHECKING:
    from arcmerge.gemma2.model import Gemma2


class Score(Protocol):
    """title: in tables and plots. minimize: less is better. identity: what tells it from another, for a journal."""

    title: str
    minimize: bool
    identity: str

    def __call__(self, model: Gemma2) -> float: ...


class Perplexity:
    """Of texts: exp of the mean negative log-probability of all their tokens.

    texts: each is cut into windows of `window` tokens, of which the first is a BOS; None: as many as the model takes.
    """

    minimize = True

    def __init__(self, texts: Sequence[str], window: int | None = None) -> None:
        if not all(text.strip() for text in texts):
            raise ArcmergeError("a text to score must have words in it; one of them is empty")
        self.texts = texts
        self.window = window
        self.title = "perplexity" + (f", windows of {window} tokens" if window else "")
        self.identity = _digest("perplexity", str(window), *texts)

    def __call__(self, model: Gemma2) -> float:
        """Tokens count alike, whichever text they are of."""
        total = tokens = 0.0
        for text in self.texts:
            count = len(model.text.encode(text)) - 1
            total += count * math.log(model.perplexity(text, self.window))
            tokens += count
        return math.exp(total / tokens)


@dataclass(frozen=True)
class Question:
    context: str
    choices: tuple[str, ...]
    answer: int


class MultipleChoice:
    """The share of questions whose right answer is the most probable of their choices, as lm-eval's `acc`."""

    title = "accuracy"
    minimize = False

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions
        self.identity = _digest("choices", *map(repr, questions))

    def __call__(self, model: Gemma2) -> float:
        most = model.config.max_position_embeddings + 1  # nothing follows the last token
        pairs = []
        for question in self.questions:
            for choice in question.choices:
                context, answer = pair = model.text.split(question.context, choice)
                if len(context) + len(answer) > most:
                    raise ArcmergeError(
                        f"a context with its choice must have at most {most} tokens, as the model takes no more, got "
                        f"{len(context) + len(answer)}: {question.context!r:.80}"
                    )
                pairs.append(pair)
        scores = iter([one.logprob for one in model.score(pairs)])
        right = 0
        for question in self.questions:
            found = [next(scores) for _ in question.choices]
            right += found.index(max(found)) == question.answer
        return right / len(self.questions)


class Function:
    """Any function of a model, named `module:function`; found in the working directory too."""

    def __init__(self, name: str, minimize: bool) -> None:
        self._name = name
        module, colon, function = name.partition(":")
        if not colon or not module or not function:
            raise ArcmergeError(f"a function to score by must be named module:function, got '{name}'")
        if "" not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ArcmergeError(f"the function '{name}' cannot be found: {error}") from error
        except (Exception, SystemExit) as error:
            raise ArcmergeError(f"the module of the function '{name}' {_raises(error)}") from error
        if not hasattr(found, function):
            raise ArcmergeError(f"the function '{name}' cannot be found: {module} has no '{function}'")
        self._function: Callable[[Any], float] = getattr(found, function)
        if not callable(self._function):
            raise ArcmergeError(f"'{name}' must be a function of a model, got {self._function!r:.80}")
        self.title, self.minimize, self.identity = function, minimize, _digest("function", name)

    def __call__(self, model: Gemma2) -> float:
        """Raises ArcmergeError, with the line in the function's own file, for what it raises or returns amiss."""
        try:
            value = self._function(model)
        except ArcmergeError:
            raise
        except (Exception, SystemExit) as error:
            raise ArcmergeError(f"the function '{self._name}' {_raises(error)}") from error
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise ArcmergeError(f"the function '{self._name}' must return a number, got {value!r:.80}") from error

    def __reduce__(self) -> tuple[type[Function], tuple[str, bool]]:
        """By its name, so that another process finds it as this one did."""
        return Function, (self._name, self.minimize)


def _raises(error: BaseException) -> str:
    """What a user's code raised, and in which line of it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename}:{frame.lineno}"
    if isinstance(error, SyntaxError):  # raised by the import, in no line of the file
        where = f"{error.filename}:{error.lineno}"
    reason = f": {error}" if str(error) else ""
    return f"raises {type(error).__name__} at {where}{reason}"


def read_texts(files: Sequence[Path]) -> list[str]:
    try:
        return [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise ArcmergeError(f"a text to score cannot be read: {error}") from error


def read_questions(file: Path) -> list[Question]:
    """Lines of JSON: {"context": text, "choices": [texts], "answer": the number of the right one, from 0}."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArcmergeError(f"the tasks cannot be read: {error}") from error
    found = [_question(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ArcmergeError(f"{file}: must have a question in it, has none")
    return found


def _question(line: str, place: str) -> Question:
    rule = 'must be {"context": text, "choices": [two texts or more, none empty], "answer": the index of the right one}'
    try:
        entry = parse_object(line.encode(), Path(place))
        context, choices, answer = (entry[key] for key in ("context", "choices", "answer"))
    except (ArcmergeError, KeyError) as error:
        raise ArcmergeError(f"{place}: {rule}, got {line:.80}") from error
    texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(text, str) and text for text in choices)
    if not (isinstance(context, str) and texts and type(answer) is int and 0 <= answer < len(choices)):
        raise ArcmergeError(f"{place}: {rule}, got {line:.80}")
    return Question(context, tuple(choices), answer)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
