"""Progress bars of work in several processes, drawn by one."""

import multiprocessing
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_BETWEEN_REPORTS = 0.2


class Step(NamedTuple):
    """How far a piece of work is."""

    description: str
    done: int
    total: int
    note: str


class Bars:
    """One bar for each description, in the order in which they are first heard of."""

    def __init__(self) -> None:
        self.bars: dict[str, tqdm] = {}

    def show(self, step: Step) -> None:
        if step.description not in self.bars:
            self.bars[step.description] = tqdm(
                total=step.total,
                desc=f"{step.description:<16}",
                position=len(self.bars),
                bar_format="{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} {elapsed}<{remaining} {postfix}",
            )
        bar = self.bars[step.description]
        bar.set_postfix_str(step.note, refresh=False)
        bar.n = step.done
        bar.refresh()
        if step.done == step.total:
            bar.close()

    def close(self) -> None:
        for bar in self.bars.values():
            bar.close()


class Tracker:
    """Wraps what a piece of work loops over, and tells `show` how far it is.

    `note` is shown beside the bar: set it inside the loop.
    """

    def __init__(self, show: Callable[[Step], Any]) -> None:
        self.show = show
        self.note = ""

    def __call__(self, items: Iterable[T], total: int, description: str) -> Iterator[T]:
        self.note = ""
        last = 0.0
        self.show(Step(description, 0, total, ""))
        for done, item in enumerate(items, 1):
            yield item
            if done == total or time.monotonic() - last > SECONDS_BETWEEN_REPORTS:
                self.show(Step(description, done, total, self.note))
                last = time.monotonic()


def silent() -> Tracker:
    return Tracker(lambda step: None)


_tracker = silent()


def _set_tracker(steps: Any) -> None:
    global _tracker
    _tracker = Tracker(steps.put)


def _run(function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    return function(*arguments, _tracker)


def side_by_side(*jobs: tuple[Callable[..., Any], tuple[Any, ...]]) -> list[Any]:
    """Run each (function, arguments) in its own process, a `Tracker` as its last argument; return what they return.

    Raises what the first to fail raises.
    """
    context = multiprocessing.get_context("spawn")
    steps = context.Queue()
    bars = Bars()
    with ProcessPoolExecutor(len(jobs), context, _set_tracker, (steps,)) as pool:
        futures: list[Future[Any]] = [pool.submit(_run, function, arguments) for function, arguments in jobs]
        try:
            while not all(future.done() for future in futures):
                _show_next(steps, bars)
                if any(future.done() and future.exception() for future in futures):
                    break
            while _show_next(steps, bars):
                pass
        except BaseException:
            _terminate(pool)
            raise
        finally:
            bars.close()
        failed = [future for future in futures if future.done() and future.exception()]
        if failed:
            _terminate(pool)
            failed[0].result()
    return [future.result() for future in futures]


def _show_next(steps: Any, bars: Bars) -> bool:
    """Wait a moment for a step, show it; whether there was one."""
    try:
        bars.show(steps.get(timeout=SECONDS_BETWEEN_REPORTS))
    except queue.Empty:
        return False
    return True


def _terminate(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.terminate()
