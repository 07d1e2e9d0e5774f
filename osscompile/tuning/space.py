"""The points of a kernel's space: all ways to answer the questions of its schedule rule."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc

from ..schedules.records import Choose
from ..schedules.rule import schedule
from ..targets import Target

DRAWS_PER_POINT = 20  # random answers often repeat a known program
SEED = 1  # the same points every time, so that an interrupted run goes on with those it measured

Report = Callable[[str], object]


@dataclass(frozen=True)
class Point:
    """A schedule of a kernel and the constants that it took. `program` names the code."""

    constants: dict[str, int]
    function: PrimFunc
    program: str


def choose_points(
    function: PrimFunc, target: Target, most: int, report: Report = print
) -> list[Point]:
    """Return the default first, then up to `most` others, no two with the same program.

    A space with so few points comes whole; from a larger one points are drawn. `report` hears of
    answers that the rule cannot follow.
    """
    default = make_point(function, target, lambda name, candidates, default: default)
    points = {default.program: default}
    failed: set[str] = set()

    def answer(choose: Choose) -> Point | None:
        constants: dict[str, int] = {}
        try:
            point = make_point(function, target, choose, constants)
        except Exception as error:  # schedule primitives may raise anything
            if repr(constants) not in failed:
                report(f"{function.attrs['op']} with {constants}: cannot be scheduled: {error!r}")
            failed.add(repr(constants))
            return None
        return point

    for point in _every_point(answer):
        if point is not None:
            points.setdefault(point.program, point)
        if len(points) > most + 1:
            points = {default.program: default}
            break
    else:
        return list(points.values())
    for point in _random_points(function, answer, most * DRAWS_PER_POINT):
        if point is not None:
            points.setdefault(point.program, point)
        if len(points) > most:
            break
    return list(points.values())


def make_point(
    function: PrimFunc,
    target: Target,
    choose: Choose,
    constants: dict[str, int] | None = None,
) -> Point:
    """Return the schedule for the answers of `choose`, which it also writes into `constants`."""
    chosen: dict[str, int] = {} if constants is None else constants

    def once(name: str, candidates: Sequence[int], default: int) -> int:
        if name not in chosen:  # a record has one value for a name
            chosen[name] = choose(name, candidates, default)
        return chosen[name]

    scheduled = schedule(function, target, once)
    return Point(chosen, scheduled, name_program(scheduled, target))


def name_program(function: PrimFunc, target: Target) -> str:
    """Return the same name for the same code in every process; it covers all of a library."""
    text = f"{target!r}\n{function.script(show_meta=True)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _every_point(answer: Callable[[Choose], Point | None]) -> Iterator[Point | None]:
    """Visit all points depth first, because later questions may depend on earlier answers."""
    path: list[int] = []  # the candidate taken for each question
    while True:
        counts: list[int] = []

        def choose(
            name: str, candidates: Sequence[int], default: int, counts: list[int] = counts
        ) -> int:
            if len(counts) == len(path):
                path.append(0)
            counts.append(len(candidates))
            return candidates[path[len(counts) - 1]]

        yield answer(choose)
        del path[len(counts) :]
        while path and path[-1] + 1 == counts[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1


def _random_points(
    function: PrimFunc, answer: Callable[[Choose], Point | None], count: int
) -> Iterator[Point | None]:
    """Draw points with TVM's sampling primitive.

    MetaSchedule's strategies, which call it too, do not fit: evolutionary and replay-trace replay a
    trace, in which the numbers that a rule computed from its answers stay as recorded, and
    replay-func takes no symbolic shapes.
    """
    sampler = Schedule(function, seed=SEED)

    def choose(name: str, candidates: Sequence[int], default: int) -> int:
        share = 1 / len(candidates)
        sampled = sampler.sample_categorical(list(candidates), [share] * len(candidates))
        return int(sampler.get(sampled))

    for _ in range(count):
        yield answer(choose)
