import pytest
import torch

import lesa
from lesa import Reuse, StepPlan, Taylor
from tests.lesa.adapters import tiny
from tests.lesa.adapters.probes import PLAN, call_at
from tests.lesa.adapters.tiny import STEPS, generate
from tests.lesa.strategies import schedule


def test_a_bare_transformer_takes_the_times_of_its_schedule(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN):
        expected = generate(pipeline)
    sigmas = pipeline.scheduler.sigmas.clone()
    for times in (sigmas, None):
        with lesa.enable(pipeline.transformer, Taylor(1), PLAN, times=times) as handle:
            for _ in range(2):
                torch.testing.assert_close(generate(pipeline), expected)
                assert tuple(handle.records[0].full) == PLAN.full_steps
    with lesa.enable(pipeline.transformer, Taylor(1, "time"), PLAN), pytest.raises(ValueError, match="needs the times"):
        generate(pipeline)
    with (
        lesa.enable(pipeline.transformer, Taylor(1), PLAN, times=sigmas * 0.9),
        pytest.raises(ValueError, match="not in times"),
    ):
        generate(pipeline)


def test_a_table_serves_its_own_schedule_only(pipeline):
    generate(pipeline)
    table = Taylor(1).table(PLAN, pipeline.scheduler.sigmas)
    with lesa.enable(pipeline, table):
        generate(pipeline)
        with pytest.raises(ValueError, match="another schedule"):
            pipeline(**tiny.arguments(), sigmas=[1 - 0.09 * i for i in range(STEPS)])
    with pytest.raises(ValueError, match="made for the plan"):
        lesa.enable(pipeline, table, StepPlan(STEPS, [0, 5]))


def test_a_generation_that_starts_part_way_takes_the_rest_of_the_plan(pipeline):
    times = schedule(STEPS)
    with torch.no_grad(), lesa.enable(pipeline.transformer, Taylor(1), PLAN, times=times) as handle:
        for time in times[3:-1]:
            call_at(pipeline.transformer, time)
    assert (handle.records[0].full, handle.records[0].predicted) == ([3, 4, 7], [5, 6, 8, 9])


def test_a_table_is_made_once_for_each_schedule(pipeline):
    class Counting(Reuse):
        made = 0

        def table(self, plan, times):
            Counting.made += 1
            return super().table(plan, times)

    with lesa.enable(pipeline, Counting(), PLAN):
        for _ in range(3):
            generate(pipeline)
    assert Counting.made == 1
