"""A forecaster of one's own, registered by name and run on the demo's pipeline."""

from dataclasses import dataclass

import lesa
from lesa.demo.model import load_pipeline, request


@dataclass(frozen=True)
class Damped(lesa.Forecaster):
    """The last full feature, and a share of the slope that led to it."""

    share: float = 0.5
    needs_times = False  # distances are numbers of steps
    reach = 2  # a prediction uses the latest two full features

    def table(self, plan, times):
        def rule(step, rows):
            last, before = [full for full in reversed(plan.full_steps) if full < step][:2]
            return rows[last] + self.share * (step - last) / (last - before) * (rows[last] - rows[before])

        return lesa.unroll(plan, times, rule)


lesa.register_forecaster("damped", Damped)

pipeline = load_pipeline()
plan = lesa.StepPlan.paper(50, interval=7)
with lesa.enable(pipeline, lesa.make_forecaster("damped", share=0.8), plan) as handle:
    image = pipeline(**request(labels=[3], seeds=[0])).images
    print(handle.summary())
