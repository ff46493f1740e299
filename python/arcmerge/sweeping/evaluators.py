"""Where candidates are merged and scored: in this process, or by actors of a Ray cluster; parents resident in each."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from arcmerge.errors import ArcmergeError, needed
from arcmerge.sweeping.candidates import Candidate
from arcmerge.sweeping.scores import Score

# A candidate whose actor dies as often is what kills them.
MOST_DEATHS = 3


class Evaluated(NamedTuple):
    """seconds: of merging and scoring."""

    candidate: Candidate
    score: float
    seconds: float


@dataclass(frozen=True)
class EvaluationSpec:
    """What it takes to score a candidate. options: as of Gemma2.from_merge."""

    recipe: str
    score: Score
    device: str
    numerics: str
    options: dict[str, Any] = field(default_factory=dict)


class LocalEvaluator:
    """In this process, one after another."""

    def __init__(self, bench: EvaluationSpec) -> None:
        from arcmerge.gemma2.model import Gemma2

        self._score = bench.score
        self._model = Gemma2.from_merge(bench.recipe, bench.device, bench.numerics, **bench.options)

    def evaluate(self, candidates: Iterable[Candidate]) -> Iterator[Evaluated]:
        """Scores in the order of the candidates, of which it takes one when it gives the last one's."""
        for candidate in candidates:
            yield Evaluated(candidate, *self.score(candidate))

    def score(self, candidate: Candidate) -> tuple[float, float]:
        started = time.monotonic()
        self._model.set_t(candidate.parameters)
        return self._score(self._model), time.monotonic() - started


class RayEvaluator:
    """By an actor for each GPU of a Ray cluster; where it has none, for each `threads` processors of a machine.

    The cluster is the one that RAY_ADDRESS names, or else this machine. Models must be found under the same paths on
    all machines. Actors may die: their candidates are scored again by others.
    """

    def __init__(self, bench: EvaluationSpec) -> None:
        with needed("ray", by="--ray", extra="ray"):
            import ray
        self._ray: Any = ray
        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        machines: list[dict[str, float]] = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = [machine for machine in machines if machine.get("GPU", 0) >= 1]
        if bench.device.startswith("cuda") and not gpus:
            raise ArcmergeError(f"--device {bench.device}: the cluster has no GPU; use --device cpu")
        self._on_gpus = bool(gpus) and bench.device != "cpu"
        if self._on_gpus:  # as many processors as an actor can have beside any of the GPUs
            most = int(min(machine.get("CPU", 0) // machine["GPU"] for machine in gpus))
        else:
            most = int(max(machine.get("CPU", 0) for machine in machines))
        self._threads = max(1, min(bench.options.get("threads") or most, most))
        kind, each = ("GPU", 1) if self._on_gpus else ("CPU", self._threads)
        self._count = sum(int(machine.get(kind, 0)) // each for machine in machines)
        if not self._count:
            raise ArcmergeError("--ray: the cluster has neither a processor nor a GPU to give; add machines to it")
        options = {name: value for name, value in bench.options.items() if name != "warn"}
        # An actor sees the one GPU that is its own, whatever its number.
        device = bench.device.partition(":")[0]
        self._bench = EvaluationSpec(bench.recipe, bench.score, device, bench.numerics, options)

    def evaluate(self, candidates: Iterable[Candidate]) -> Iterator[Evaluated]:
        """Scores in the order in which they are done; takes a candidate whenever an actor has nothing to do."""
        ray, waiting, following = self._ray, deque[Candidate](), iter(candidates)
        idle = deque(self._actor() for _ in range(self._count))
        working: dict[Any, tuple[Any, Candidate]] = {}
        deaths: Counter[str] = Counter()
        try:
            while True:
                while idle and (candidate := waiting.popleft() if waiting else next(following, None)) is not None:
                    actor = idle.popleft()
                    working[actor.score.remote(candidate)] = actor, candidate
                if not working:
                    return
                (done, *_), _rest = ray.wait(list(working), num_returns=1)
                actor, candidate = working.pop(done)
                try:
                    found = ray.get(done)
                except ray.exceptions.RayActorError as error:
                    if error.actor_init_failed:  # which another one would too
                        *_, reason = str(error).split("ArcmergeError: ")
                        raise ArcmergeError(f"a worker of the cluster cannot start: {reason.strip()}") from error
                    deaths[candidate.name] += 1
                    if deaths[candidate.name] >= MOST_DEATHS:
                        raise ArcmergeError(
                            f"{candidate.name}: the worker that scored it died {MOST_DEATHS} times; see Ray's "
                            "logs, and give workers more memory"
                        ) from error
                    waiting.append(candidate)
                    idle.append(self._actor())
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                else:
                    idle.append(actor)
                    yield Evaluated(candidate, *found)
        finally:
            for actor in [*idle, *(actor for actor, _ in working.values())]:
                ray.kill(actor)

    def _actor(self) -> Any:
        needs = {"num_cpus": self._threads, "num_gpus": int(self._on_gpus)}
        return self._ray.remote(**needs)(Worker).remote(self._bench, self._threads)


class Worker:
    """An actor: a residence of the parents with threads of its own."""

    def __init__(self, bench: EvaluationSpec, threads: int) -> None:
        import torch  # noqa: F401, so that its threads are set too

        from arcmerge.threads import use_threads

        use_threads(threads)
        bench.options["threads"] = threads
        self._here = LocalEvaluator(bench)

    def score(self, candidate: Candidate) -> tuple[float, float]:
        return self._here.score(candidate)
