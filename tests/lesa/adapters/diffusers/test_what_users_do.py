"""Random sequences of user actions with true features as predictions.

Every known output head is tested, and a class without one.

Two equal pipelines get the same calls: one without lesa, whose features before the output head are recorded, and one
with lesa, which uses these features as its predictions. Then for every call

- the output equals the one without lesa: bit for bit where the forward ran, and up to rounding where the known output
  head was used;
- a step is full exactly if the plan says so, or if it is the first of its branch or the first after a change of
  conditions or of the model: no step is predicted from stale features, and no step runs in full without need.
"""

import contextlib
import gc
import weakref
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import nn

from lesa import StepPlan
from lesa.api.enable import Handle
from lesa.runtime.accelerator import Accelerator
from lesa.tables.forecaster import Forecaster
from lesa.tables.memory import IntervalPrediction, Memory
from tests.lesa.adapters.diffusers.families import FAMILIES
from tests.lesa.adapters.diffusers.models.catalogue import ROWS
from tests.lesa.adapters.diffusers.models.row import build

WITHOUT_OUTPUT_HEAD = "SanaTransformer2DModel"  # a class whose output head is not known
PROMPTS = ("encoder_hidden_states", "pooled_projections", "class_labels")
# families that are called with the noise level; the others are called with the timestep
CALLED_WITH_NOISE_LEVEL = ("flux", "flux with guidance", "qwen image")
EVENTS = ["nothing", "replace", "write", "touch", "copy", "alter times", "raise", "wrap during generation"]


def plan_of(times):
    """Every third step, counted from the end, so that the plan does not depend on where a stream starts."""
    steps = len(times) - 1
    return StepPlan(steps, {0, *(step for step in range(steps) if is_planned(step, steps))})


def is_planned(step, steps):
    """Whether the plan makes a step full."""
    return (steps - step) % 3 == 0


class Wrapped(nn.Module):
    """A layer or block whose output is scaled, as a LoRA would change it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        result = self.inner(*args, **kwargs)
        return tuple(map(scaled, result)) if isinstance(result, tuple) else scaled(result)


def scaled(result):
    return None if result is None else 1.25 * result


class Pipeline:
    """A transformer and its scheduler, with the inputs of the transformer's family."""

    def __init__(self, family):
        torch.manual_seed(0)
        if family == WITHOUT_OUTPUT_HEAD:
            self.transformer = build(WITHOUT_OUTPUT_HEAD, ROWS[WITHOUT_OUTPUT_HEAD])
            self.inputs = {k: v for k, v in ROWS[WITHOUT_OUTPUT_HEAD].inputs(1.0).items() if k != "timestep"}
        else:
            self.transformer, self.inputs = FAMILIES[family]()
        self.transformer.eval().requires_grad_(False)
        for parameter in self.transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        self.family = family
        self.crops = family != "dit"  # its images must be square
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.components = {"transformer": self.transformer, "scheduler": self.scheduler}
        self.now = ("", -1)  # branch and step of the current call

    def conditions(self, branch, batch, small):
        """Fresh tensors for a generation."""
        made = {}
        for name, value in self.inputs.items():
            if name == "hidden_states":
                continue
            if isinstance(value, torch.Tensor):
                value = value.clone()
                if name in PROMPTS and branch == "uncond":
                    value = (value + 3) % 8 if value.dtype == torch.long else -0.5 * value
                if batch == 1 and name not in ("img_ids", "txt_ids"):
                    value = value[:1].clone()
                if small and name == "img_ids":
                    value = value[:8].clone()
            elif isinstance(value, list):
                value = value[:batch] if batch == 1 else list(value)
                if small and name == "img_shapes":
                    value = [(1, 2, 4)] * len(value)
            made[name] = value
        return made

    def latents(self, seed, step, batch, small):
        shape = self.inputs["hidden_states"].shape
        made = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + step))[:batch]
        if small and self.crops:
            made = made[:, :8] if made.ndim == 3 else made[..., : made.shape[-1] // 2]
        return made.clone()

    def sample(self, request, before=lambda: None, after=lambda output: None):
        """Call the transformer at each step for each branch, with latents that do not depend on its outputs."""
        self.scheduler.set_timesteps(request["steps"])
        self.scheduler.set_begin_index(0)
        event, when = request["event"], request["when"] % request["steps"]
        inference = torch.inference_mode() if request["inference"] else torch.no_grad()
        with inference:
            batch, small = request["batch"], request["small"]
            conditions = {branch: self.conditions(branch, batch, small) for branch in ("cond", "uncond")}
            for step, t in enumerate(self.scheduler.timesteps):
                for branch in branches(request, step):
                    self.now, mine = (branch, step), conditions[branch]
                    prompt = next(name for name in PROMPTS if name in mine)
                    if step == when and branch == "cond":
                        if event == "replace":
                            mine[prompt] = other(mine[prompt])
                        elif event == "write":
                            mine[prompt].copy_(other(mine[prompt]))
                        elif event == "touch":
                            mine[prompt].copy_(mine[prompt].clone())
                        elif event == "raise":
                            raise KeyError("stop here")
                        elif event == "wrap during generation":
                            self.toggle("head")
                    if event == "copy":
                        mine = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in mine.items()}
                    latents = self.latents(request["seed"], step, batch, small)
                    time = t.expand(len(latents)) / (1000 if self.family in CALLED_WITH_NOISE_LEVEL else 1)
                    time = time * 0.9 if event == "alter times" and step >= when else time
                    before()
                    with self.context(request, branch):
                        output = self.transformer(hidden_states=latents, timestep=time, **mine, return_dict=False)[0]
                    after(output.clone())
                self.scheduler.step(torch.zeros(1), t, torch.zeros(1))
        if hasattr(self.transformer, "_reset_stateful_cache"):
            self.transformer._reset_stateful_cache()

    def context(self, request, branch):
        named = request["named"] and hasattr(self.transformer, "cache_context")
        return self.transformer.cache_context(branch) if named else contextlib.nullcontext()

    def toggle(self, what):
        """Wrap a part of the model, or unwrap it if it is wrapped already."""
        owner, name = self.location(what)
        module = owner._modules[name]
        owner._modules[name] = module.inner if isinstance(module, Wrapped) else Wrapped(module)

    def location(self, what):
        lists = [child for child in self.transformer.children() if isinstance(child, nn.ModuleList) and len(child)]
        return {"head": (self.transformer, "norm_out"), "block": (lists[-1], str(len(lists[-1]) - 1))}[what]


def other(tensor):
    """Another valid prompt or class."""
    return (tensor + 1) % 8 if tensor.dtype == torch.long else tensor * 1.5


def branches(request, step):
    """The branches of a step in the order of their calls; guidance is off, on, begins late or ends early."""
    guided = {"off": (), "on": range(99), "late": range(2, 99), "early": range(3)}[request["guidance"]]
    return ("uncond", "cond") if step in guided else ("cond",)


class TrueFeatures(Memory):
    """A memory that predicts the true features."""

    nbytes = num_rows = 0

    def __init__(self, pipeline, truth, plan):
        self.pipeline, self.truth, self.plan, self.kept = pipeline, truth, plan, False

    def keep(self, step, feature):
        assert torch.equal(feature, self.truth[self.pipeline.now])
        self.kept = True

    def can_predict(self, step):
        return self.kept and not self.plan.is_full(step)

    def predict(self, step):
        assert self.pipeline.now[1] == step
        return self.truth[self.pipeline.now].clone()

    def predict_interval(self, step):
        """The features up to the next full step, or up to the last step of this branch."""
        branch, steps = self.pipeline.now[0], []
        while step < self.plan.num_steps and not self.plan.is_full(step) and (branch, step) in self.truth:
            if steps and self.truth[branch, step].shape != self.truth[branch, steps[0]].shape:
                break
            steps.append(step)
            step += 1
        features = torch.stack([self.truth[branch, s] for s in steps])
        return IntervalPrediction(steps, features, torch.eye(len(steps)), None)

    def clear(self):
        self.kept = False


class TrueForecaster(Forecaster):
    """Predicts the true features of the accelerator."""

    def __init__(self, accelerator):
        self.accelerator = weakref.proxy(accelerator)

    def table(self, plan, times):
        raise AssertionError("predictions come from make_memory")

    def make_memory(self, plan, times, previous):
        return TrueFeatures(self.accelerator.pipeline, self.accelerator.truth, plan)


class RecordingAccelerator(Accelerator):
    """The accelerator of lesa with a forecaster of true features; ``outcomes`` says which calls were predicted."""

    def __init__(self, pipeline):
        super().__init__(TrueForecaster(self), plan_of)
        self.pipeline, self.truth, self.outcomes = weakref.proxy(pipeline), {}, {}

    def begin(self, call):
        predicted = super().begin(call)
        self.outcomes[self.pipeline.now] = "predicted" if predicted else "full"
        return predicted


requests = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 3),
        "steps": st.integers(2, 7),
        "batch": st.integers(1, 2),
        "small": st.booleans(),
        "guidance": st.sampled_from(["off", "on", "late", "early"]),
        "named": st.booleans(),
        "inference": st.booleans(),
        "event": st.sampled_from(EVENTS),
        "when": st.integers(0, 6),
    }
)


class UserActions(RuleBasedStateMachine):
    """Actions on one pipeline at a time."""

    handle: Any = None

    @initialize(family=st.sampled_from([*FAMILIES, WITHOUT_OUTPUT_HEAD]))
    def load(self, family):
        self.pipeline, self.plain = Pipeline(family), Pipeline(family)
        self.kind = type(self.pipeline.transformer)

    @rule(request=requests)
    def generate(self, request):
        outputs, untouched, calls = [], [], []
        truth = self.features_without_lesa(request, untouched)
        if self.handle is None:
            return
        accelerator = self.handle._accelerator
        accelerator.truth.clear()
        accelerator.truth.update(truth)
        accelerator.outcomes.clear()
        try:
            self.pipeline.sample(request, lambda: calls.append(self.pipeline.now), outputs.append)
        except KeyError:
            assert request["event"] == "raise"
        if request["event"] == "wrap during generation":
            self.pipeline.toggle("head")
        assert len(outputs) == len(untouched) == len(calls)
        expected_outcomes = self.expected_outcomes(request, calls)
        assert {call: accelerator.outcomes[call] for call in calls} == expected_outcomes
        for call, ours, theirs in zip(calls, outputs, untouched, strict=True):
            if expected_outcomes[call] == "full" or self.pipeline.family == WITHOUT_OUTPUT_HEAD:
                assert torch.equal(ours, theirs), call
            else:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
        if request["event"] != "raise":
            assert accelerator.going_on == []

    def features_without_lesa(self, request, outputs):
        """The features of a generation without lesa, by branch and step; its outputs are appended to ``outputs``."""
        truth, hooks, plain = {}, [], self.plain

        def add_hook():
            owner, name = plain.location("head")
            hooks.append(owner._modules[name].register_forward_pre_hook(record, with_kwargs=True))

        def record(module, args, kwargs):
            truth[plain.now] = (args[0] if args else next(iter(kwargs.values()))).clone()

        def done(output):
            hooks.pop().remove()
            outputs.append(output)

        with contextlib.suppress(KeyError):
            plain.sample(request, add_hook, done)
        if request["event"] == "wrap during generation":
            plain.toggle("head")
        return truth

    def expected_outcomes(self, request, calls):
        """Whether each call has to be full or predicted."""
        steps, when = request["steps"], request["when"] % request["steps"]
        began: set[str] = set()
        outcomes = {}
        for branch, step in calls:
            changed = request["event"] in ("replace", "write") and (branch, step) == ("cond", when)
            if request["event"] == "wrap during generation":  # before the call of "cond", the last one of a step
                changed = step == when + (branch == "uncond")
            full = branch not in began or changed or is_planned(step, steps)
            began.add(branch)
            outcomes[branch, step] = "full" if full else "predicted"
        return outcomes

    @precondition(lambda self: self.handle is None)
    @rule()
    def enable(self):
        self.handle = Handle(self.pipeline, RecordingAccelerator(self.pipeline))

    @precondition(lambda self: self.handle is not None)
    @rule()
    def disable(self):
        self.handle.disable()
        self.handle = None
        self.check_nothing_remains()

    def check_nothing_remains(self):
        transformer = self.pipeline.transformer
        assert type(transformer) is self.kind
        for module in transformer.modules():
            assert not [name for name in vars(module) if name.startswith("_lesa")]
            assert not module._forward_pre_hooks
            assert not (hasattr(module, "_diffusers_hook") and module._diffusers_hook.hooks)
        assert "enable_cache" not in vars(transformer)
        assert "_reset_stateful_cache" not in vars(transformer)
        assert not [name for name in vars(self.pipeline) if name.startswith("_lesa")]

    @rule(shift=st.sampled_from([1.0, 3.0]))
    def replace_scheduler(self, shift):
        for pipeline in (self.pipeline, self.plain):
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)

    @rule(what=st.sampled_from(["head", "block"]))
    def wrap_or_unwrap(self, what):
        for pipeline in (self.pipeline, self.plain):
            pipeline.toggle(what)

    @precondition(lambda self: hasattr(self.pipeline.transformer, "add_adapter"))
    @rule()
    def load_or_unload_a_lora(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=r".*(to_q|proj_out)", init_lora_weights=False)
        for transformer in (self.pipeline.transformer, self.plain.transformer):
            torch.manual_seed(0)
            if getattr(transformer, "peft_config", None):
                transformer.unload_lora()
            else:
                transformer.add_adapter(config)

    @rule()
    def compile(self):
        for pipeline in (self.pipeline, self.plain):
            owner, name = pipeline.location("block")
            owner._modules[name].compile(backend="eager")

    @rule()
    def drop(self):
        transformer = weakref.ref(self.pipeline.transformer)
        family, self.handle, self.pipeline = self.pipeline.family, None, None
        gc.collect()
        assert transformer() is None
        self.load(family)

    def teardown(self):
        if self.handle is not None:
            self.disable()


@pytest.fixture
def without_compilation(monkeypatch):
    """Skip compilation and keep older objects out of garbage collection, to save time.

    Compilation has its own tests; here the wrapper that it puts on a module is enough.
    """
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def run(sequences):
    """Run a number of random sequences."""
    every = settings(max_examples=sequences, stateful_step_count=8, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(UserActions, settings=every)


# a generation of two steps predicts nothing if a change makes the second one full, and gives a warning
pytestmark = [pytest.mark.filterwarnings("ignore::lesa.LesaWarning"), pytest.mark.usefixtures("without_compilation")]


def test_random_user_actions_never_predict_from_stale_features():
    run(500)


@pytest.mark.full
def test_many_more_random_user_actions_never_predict_from_stale_features():
    run(10_000)
