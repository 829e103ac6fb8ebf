"""The methods that the demo compares."""

import dataclasses
from collections.abc import Iterable

from benchmarks.demo.taylorseer import taylorseer
from lesa.api.choose import UNCALIBRATED
from lesa.calibration.calibration import Calibration
from lesa.evaluation.methods import FULL, Method, predicted
from lesa.forecasters import Forecaster, LeastSquares, Reuse, Taylor
from lesa.predictor.config import LesaConfig
from lesa.predictor.predictor import LesaPredictor
from lesa.statistics.gram import GramMatrix
from lesa.tables.plan import StepPlan
from lesa.training.from_gram import fit_gram
from lesa.training.trajectories import Trajectories
from lesa.training.two_stage import fit

NUM_STEPS = 50
INTERVALS = (5, 7, 10)
LIVE_INTERVAL = 7  # of the predictor that the demo trains during the run, and of the one with latent="kan"
TAYLORSEER_INTERVAL = LIVE_INTERVAL
DEFAULT = "path least squares (default)"
TAYLORSEER_PLAN = f"TaylorSeer interval={TAYLORSEER_INTERVAL}"


def all_methods(
    predictors: dict[int, LesaPredictor], gram: GramMatrix, kan: LesaPredictor, best: list[Method]
) -> list[Method]:
    """The full sampler, forecasters on the paper's plans, diffusers' TaylorSeer, ours on its steps, and ``best``.

    ``predictors``: by the interval of the paper's plan.
    """
    methods = [FULL]
    for interval in predictors:
        forecasters: dict[str, Forecaster] = {
            "reuse": Reuse(),
            "Taylor 1": Taylor(1),
            "Taylor 2": Taylor(2),
            "LESA": predictors[interval],
            "least squares": LeastSquares(gram),
        }
        plan = StepPlan.paper(NUM_STEPS, interval)
        methods += [
            predicted(name, forecaster, plan, f"paper N={interval}") for name, forecaster in forecasters.items()
        ]
        if interval == LIVE_INTERVAL:
            # it evaluates splines of every element: on a CPU that is slower than the full sampler
            slow = predicted("LESA, KAN on features", kan, plan, f"paper N={interval}")
            methods.append(dataclasses.replace(slow, timed=False))
    # As many full steps, but other ones: the last is step 46, not 44. That matters more than the method.
    methods += [taylorseer(order, TAYLORSEER_INTERVAL) for order in (1, 2)]
    theirs = StepPlan(NUM_STEPS, [0, 1, 2, *range(4, NUM_STEPS, TAYLORSEER_INTERVAL)])
    methods += [
        predicted("Taylor 2", Taylor(2), theirs, TAYLORSEER_PLAN),
        predicted("LESA", predictors[TAYLORSEER_INTERVAL], theirs, TAYLORSEER_PLAN),
        predicted("least squares", LeastSquares(gram), theirs, TAYLORSEER_PLAN),
    ]
    return methods + best


def calibrated_methods(
    calibration: Calibration, trajectories: Trajectories, config: LesaConfig, intervals: Iterable[int]
) -> list[Method]:
    """Methods on the best plans of a calibration and on even plans, with as many full steps as the paper's plans.

    Both ways to train a LESA predictor are included for the interval for which the demo trains one itself.
    """
    methods = []
    (stream,) = calibration.streams
    for interval in intervals:
        count = len(StepPlan.paper(NUM_STEPS, interval).full_steps)
        even, best = StepPlan.even(calibration.times, count), calibration.plan(count)
        methods.append(predicted("Taylor 2 in time", UNCALIBRATED, even, f"even, {count} steps"))
        forecasters: dict[str, Forecaster] = {
            "Taylor 2": Taylor(2),
            "least squares": LeastSquares(calibration.streams[stream].gram),
            DEFAULT: calibration.forecasters()[stream],
        }
        if interval == LIVE_INTERVAL:
            forecasters["LESA, paper's training"] = fit(trajectories, best, config)
            forecasters["LESA, fit_gram"] = fit_gram(calibration.errors(), best, calibration.times, config)
        methods += [
            predicted(name, forecaster, best, f"calibrated, {count} steps") for name, forecaster in forecasters.items()
        ]
    return methods
