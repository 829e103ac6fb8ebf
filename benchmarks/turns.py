"""Runs several generations in one process, in turns of some denoising steps each.

The speed of a shared machine varies from second to second by more than the differences to measure. So a generation is
compared with short turns of the full sampler directly before and after it. Turns of a single step would be unfair: the
processor's caches are lost at each change, and only the full sampler would run next to its own steps.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Generation = Callable[[Callable[[], None]], object]  # its argument must be called at the end of each step
Step = tuple[float, float]  # start and end, in seconds


class _CancelledError(Exception):
    """Another generation failed, so this one is cancelled."""


class _Turns(threading.Thread):
    """A generation in a separate thread, which runs a given number of steps at a time."""

    def __init__(self, generation: Generation, threads: int) -> None:
        super().__init__(daemon=True)  # so that an interrupt ends the process while threads wait
        self.steps: list[Step] = []
        self.failure: BaseException | None = None
        self._generation, self._threads = generation, threads
        self._left = 0
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = False
        self._begun = 0.0

    def give(self, steps: int) -> list[Step]:
        """Run this number of steps; return after the last one or when the generation fails."""
        done, self._left = len(self.steps), steps
        self._mine.release()
        self._theirs.acquire()
        return self.steps[done:]

    def finish(self, *, failed: bool) -> None:
        """Let the generation run to its end, or cancel it."""
        self._stopped, self._left = failed, -1
        self._mine.release()
        self.join()

    def run(self) -> None:
        torch.set_num_threads(self._threads)  # the default of a new thread is the number of cores
        try:
            self._wait()
            self._generation(self._step_done)
        except _CancelledError:
            pass
        except BaseException as error:  # take_turns raises it again
            self.failure = error
        self._theirs.release()

    def _step_done(self) -> None:
        self.steps.append((self._begun, time.perf_counter()))
        self._left -= 1
        if self._left == 0:
            self._theirs.release()
            self._wait()
        self._begun = time.perf_counter()

    def _wait(self) -> None:
        self._mine.acquire()
        if self._stopped:
            raise _CancelledError
        self._begun = time.perf_counter()


def take_turns(generations: Mapping[str, Generation], turns: Sequence[tuple[str, int]]) -> list[list[Step]]:
    """Start and end of the steps of every turn; a step starts at the end of the step before, or with the turn.

    Operators of each generation use as many threads as those of the caller.

    Args:
        generations: the generations, by name.
        turns: names and numbers of steps, in this order; all turns of a name add up to its steps.

    Raises:
        Exception: the exception of a generation; the others are cancelled.
    """
    running = {name: _Turns(generation, torch.get_num_threads()) for name, generation in generations.items()}
    for thread in running.values():
        thread.start()
    taken, failure = [], None
    for name, steps in turns:
        taken.append(running[name].give(steps))
        failure = running[name].failure
        if failure is not None:
            break
    for thread in running.values():
        thread.finish(failed=failure is not None)
    failure = failure or next((thread.failure for thread in running.values() if thread.failure is not None), None)
    if failure is not None:
        raise failure
    return taken
