"""Generations side by side in one process, which take turns of some denoising steps.

A machine that others use too is faster or slower from second to second, by more than what is to be measured. Long
generations, one after the other, meet it in different moods; short turns of the full sampler on both sides of a
generation tell in which one it was. Turns of one step would be unfair: who waits loses what it had in the processor's
caches, and only the full sampler would have its own steps around each.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Generation = Callable[[Callable[[], None]], object]  # is given what to call at the end of each step
Step = tuple[float, float]  # its beginning and end, in seconds


class _GivenUpError(Exception):
    """Another generation failed."""


class _Turns(threading.Thread):
    """A generation in a thread of its own, which goes on for as many steps as it is given."""

    def __init__(self, generation: Generation, threads: int) -> None:
        super().__init__(daemon=True)  # an interruption ends the process although some wait
        self.steps: list[Step] = []
        self.failure: BaseException | None = None
        self._generation, self._threads = generation, threads
        self._left = 0
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = False
        self._begun = 0.0

    def give(self, steps: int) -> list[Step]:
        """Wait until these steps are over, or until the generation failed."""
        done, self._left = len(self.steps), steps
        self._mine.release()
        self._theirs.acquire()
        return self.steps[done:]

    def finish(self, *, failed: bool) -> None:
        """What comes after the last step."""
        self._stopped, self._left = failed, -1
        self._mine.release()
        self.join()

    def run(self) -> None:
        torch.set_num_threads(self._threads)  # a new thread has as many as there are cores
        try:
            self._wait()
            self._generation(self._step_done)
        except _GivenUpError:
            pass
        except BaseException as error:  # raised again by who gave the turn
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
            raise _GivenUpError
        self._begun = time.perf_counter()


def take_turns(generations: Mapping[str, Generation], turns: Sequence[tuple[str, int]]) -> list[list[Step]]:
    """The steps of every turn; a step begins where the one before ends, or where the turn begins.

    Each generation runs with as many threads for its operators as the caller has.

    Args:
        generations: what to run, by name.
        turns: names and steps, in this order; those of a name together are the steps of its generation.

    Raises:
        Exception: what a generation raised; the others are given up.
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
