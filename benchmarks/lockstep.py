"""Generations side by side in one process, which take turns after every few denoising steps.

A machine that others use too is faster or slower from second to second, by more than what is to be measured. Long
generations, one after the other, meet it in different moods; steps of the same number, one after the other, in one.
"""

import threading
import time
from collections.abc import Callable, Mapping

import torch

Generation = Callable[[Callable[[], None]], object]  # is given what to call at the end of each step


class _Turns:
    """Lets one of several threads run at a time."""

    def __init__(self, count: int) -> None:
        self._gates = [threading.Semaphore(int(place == 0)) for place in range(count)]
        self._running = [True] * count

    def wait(self, place: int) -> None:
        self._gates[place].acquire()

    def pass_on(self, place: int) -> None:
        """To the next one that still runs, which may be the same."""
        count = len(self._gates)
        following = ((place + distance) % count for distance in range(1, count + 1))
        for other in following:
            if self._running[other]:
                self._gates[other].release()
                return

    def leave(self, place: int) -> None:
        self._running[place] = False
        self.pass_on(place)


def run_in_lockstep(generations: Mapping[str, Generation], turn: int = 1) -> dict[str, list[tuple[float, float]]]:
    """The beginning and end of every step of each, in seconds of one clock; a step begins where the one before ends.

    Each runs in a thread of its own with as many threads for its operators as the caller has.

    Args:
        generations: what to run, by name.
        turn: steps after which the others go on. Steps of microseconds should take many: who waits loses what it had in
            the processor's caches.

    Raises:
        Exception: what the first of them that failed raised, when all others are done.
    """
    turns, threads = _Turns(len(generations)), torch.get_num_threads()
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in generations}
    failures: list[BaseException] = []

    def run(place: int, name: str, generation: Generation) -> None:
        turns.wait(place)
        begun = time.perf_counter()

        def step_done() -> None:
            nonlocal begun
            steps[name].append((begun, time.perf_counter()))
            if len(steps[name]) % turn == 0:
                turns.pass_on(place)
                turns.wait(place)
            begun = time.perf_counter()

        try:
            torch.set_num_threads(threads)
            generation(step_done)
        except BaseException as error:  # raised again where the threads were started
            failures.append(error)
        finally:
            turns.leave(place)

    running = [
        threading.Thread(target=run, args=(place, name, generation))
        for place, (name, generation) in enumerate(generations.items())
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]
    return steps
