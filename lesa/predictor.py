"""LESA: a stage-aware learned predictor with KAN gates.

Source: Cai et al., "LESA: Learnable Stage-Aware Predictors for Diffusion Model Acceleration",
https://arxiv.org/abs/2602.20497. At a predicted step of time t, in stage e with window h (oldest first):

    z      = sum_k w_e[k] h[k] + b_e
    alpha  = KAN_e(t - t_0, ..., t - t_S)
    h_hat  = h[last] + alpha z

With ``latent="kan"`` z also has a KAN of the features themselves, which is beyond the paper.
"""

import copy
import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lesa import model_card, saving
from lesa.arguments import real, whole
from lesa.files import check_tensor, read_tensors
from lesa.files.tensors import FLOATS, SHOWN, damaged
from lesa.hub import CONFIG_FILE, LIBRARY, WEIGHTS_FILE, local_folder
from lesa.model_card import Report
from lesa.plan import StepPlan
from lesa.schedule import as_times, difference, same_times
from lesa.table import CoefficientTable, unroll
from lesa_kernels import KAN, combine, kan_predict

MOST = {  # of each size, since a config.json could ask for room for any number; the paper's are 50, 256, 8, 4 and 5
    "num_steps": 10_000,
    "hidden_dim": 1 << 14,
    "history": 1 << 10,
    "first_history": 1 << 10,
    "grid_size": 1 << 10,
}


@dataclass(frozen=True)
class LesaConfig:
    """The shape of a :class:`LesaPredictor`.

    Args:
        num_steps: steps of the schedule; the gates see one offset for each, and one for the final time.
        hidden_dim: width of the two hidden layers of a gate.
        history: features that the stages after the first look back on.
        boundaries: times that separate the stages, falling; a step at time t is in the first stage with t above it.
            The paper has (0.9, 0.5) for FLUX and (0.9, 0.4) for Qwen-Image.
        first_history: features that the first stage looks back on; None: half of ``history``, as in the paper.
        grid_size, spline_order, grid_range: the splines of the gates.
        latent: ``"linear"`` as in the paper, or ``"kan"``: window weights and a spline on every feature of the window.
            Such a predictor is not a linear combination of full features, so it has no table.

    Raises:
        ValueError: for sizes below one, or boundaries that do not fall within (0, 1).
    """

    num_steps: int
    hidden_dim: int = 256
    history: int = 8
    boundaries: tuple[float, ...] = (0.9, 0.5)
    first_history: int | None = None
    grid_size: int = 5
    spline_order: int = 3
    grid_range: tuple[float, float] = (-3.0, 3.0)
    latent: Literal["linear", "kan"] = "linear"

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if name != "first_history" or self.first_history is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name), least=1, most=most))
        whole("spline_order", self.spline_order, least=0, most=MOST["grid_size"])
        low, high = _numbers("grid_range", self.grid_range, 2)
        if not low < high:
            raise ValueError(f"grid_range must rise, not {low:g} to {high:g}")
        object.__setattr__(self, "boundaries", _numbers("boundaries", self.boundaries))
        object.__setattr__(self, "grid_range", (low, high))
        if self.latent not in ("linear", "kan"):
            raise ValueError(f"latent must be 'linear' or 'kan', not {self.latent!r}")
        falling = all(a > b for a, b in zip((1.0, *self.boundaries), (*self.boundaries, 0.0), strict=True))
        if not falling:
            raise ValueError(f"boundaries must fall within (0, 1), not {self.boundaries}")

    @property
    def windows(self) -> tuple[int, ...]:
        """The window length of each stage."""
        first = max(1, self.history // 2) if self.first_history is None else self.first_history
        return (first, *(self.history for _ in self.boundaries))

    @property
    def gate_widths(self) -> list[int]:
        """The layers of a gate: one input for each time of the schedule and its end, one output."""
        return [self.num_steps + 1, self.hidden_dim, self.hidden_dim, 1]

    def stage(self, time: float) -> int:
        """The stage of a step at ``time``."""
        return sum(time <= boundary for boundary in self.boundaries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights of a predictor: what ``state_dict`` calls them, and their shapes."""
        bases = self.grid_size + self.spline_order
        shapes: dict[str, tuple[int, ...]] = {}
        for stage, window in enumerate(self.windows):
            shapes |= {f"latent.{stage}.weight": (1, window), f"latent.{stage}.bias": (1,)}
            if self.latent == "kan":
                shapes |= {
                    f"latent.{stage}.base_weight": (window,),
                    f"latent.{stage}.spline_weight": (window, bases),
                }
            for layer, (inputs, outputs) in enumerate(itertools.pairwise(self.gate_widths)):
                name = f"timestep.{stage}.layers.{layer}"
                shapes |= {
                    f"{name}.base_weight": (outputs, inputs),
                    f"{name}.spline_weight": (outputs, inputs, bases),
                    f"{name}.spline_scaler": (outputs, inputs),
                    f"{name}.grid": (inputs, bases + self.spline_order + 1),
                }
        return shapes

    def check_shapes(self, given: Mapping[str, tuple[int, ...]]) -> None:
        """Complain of weights that are not those of such a predictor, before room is made for any.

        Raises:
            ValueError: if one is missing, too many or of another shape.
        """
        expected = self.shapes
        if missing := sorted(expected.keys() - given.keys()):
            raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
        if unknown := sorted(given.keys() - expected.keys()):
            raise ValueError(f"{len(unknown)} weights are none of a LESA predictor's, such as {unknown[0][:80]!a}")
        for name, shape in expected.items():
            if tuple(given[name]) != shape:
                raise ValueError(f"{name} is {list(given[name])}, where this configuration has {list(shape)}")


class WindowKAN(nn.Linear):
    """The window weights and bias of one stage, and weights [K] of SiLU and [K, C] of splines on the same window."""

    def __init__(self, window: int, bases: int) -> None:
        super().__init__(window, 1)
        # from zero: training starts at the paper's predictor
        self.base_weight = nn.Parameter(torch.zeros(window))
        self.spline_weight = nn.Parameter(torch.zeros(window, bases))


class LesaPredictor(
    nn.Module, ModelHubMixin, library_name=LIBRARY, tags=["lesa", "diffusion", "feature-caching", "acceleration"]
):
    """One window weight, bias and KAN gate for each stage; one predictor for each branch of guidance.

    The keys of ``state_dict`` are the released ones: ``latent.{e}.weight``, ``latent.{e}.bias``,
    ``timestep.{e}.layers.{l}.base_weight`` and so on.

    Attributes:
        config: its :class:`LesaConfig`.
        plan: the plan it was fitted for, or None. It serves any plan of as many steps; this is what
            :func:`lesa.enable` takes where none is given.
        schedule: the times [steps + 1] it was fitted on, or None. The gates are learned functions of these times, so
            a table for others is refused; set it to None to try all the same.
        losses: the loss curve of :func:`lesa.fit`, one list of numbers for each stage of training.
        scale: [channels], brings features into the grid of a ``latent="kan"`` predictor; set by :func:`lesa.fit`.
    """

    def __init__(self, config: LesaConfig) -> None:
        super().__init__()
        self.config = config
        self.plan: StepPlan | None = None
        self.schedule: Tensor | None = None
        self.losses: dict[str, list[float]] = {}
        bases = config.grid_size + config.spline_order
        kan = config.latent == "kan"
        self.latent = nn.ModuleList(WindowKAN(w, bases) if kan else nn.Linear(w, 1) for w in config.windows)
        self.scale: Tensor | None
        self.register_buffer("scale", torch.ones(1) if kan else None)
        self.timestep = nn.ModuleList(
            KAN(
                config.gate_widths,
                grid_size=config.grid_size,
                spline_order=config.spline_order,
                grid_range=config.grid_range,
            )
            for _ in config.windows
        )

    def _layer(self, stage: int) -> nn.Linear:
        layer = self.latent[stage]
        assert isinstance(layer, nn.Linear)
        return layer

    def gates(self, times: Tensor | Sequence[float], steps: Sequence[int] | None = None) -> Tensor:
        """alpha [steps]: the gate of every step of a schedule, or of the steps asked for.

        In one batch for each stage.

        Raises:
            ValueError: for another number of times than the predictor was made for.
        """
        known = as_times(times, self.config.num_steps)
        parameter = self._layer(0).weight
        asked = known[:-1] if steps is None else known[list(steps)]
        offsets = (asked[:, None] - known).to(parameter.device, parameter.dtype)
        stages = torch.tensor([self.config.stage(t) for t in asked.tolist()], device=parameter.device)
        result = parameter.new_zeros(len(asked))
        for stage in stages.unique().tolist():
            (members,) = torch.nonzero(stages == stage, as_tuple=True)
            result = result.index_put((members,), self.timestep[stage](offsets[members]).squeeze(-1))
        return result

    def forward(self, history: Tensor | Sequence[Tensor], times: Tensor | Sequence[float], t: float | Tensor) -> Tensor:
        """One closed-loop step of the paper, differentiable.

        Args:
            history: the latest features, full or predicted, oldest first: [k, *feature] or k tensors. More than the
                stage's window: the latest are used. Fewer: the window's latest weights are.
            times: the schedule.
            t: the time of the predicted step.

        Returns:
            [*feature], in the dtype of the features.
        """
        t = float(t)
        stage = self.config.stage(t)
        parameter = self._layer(stage).weight
        offsets = (t - as_times(times, self.config.num_steps)).to(parameter.device, parameter.dtype)
        return self.advance(history, stage, self.timestep[stage](offsets))

    def advance(self, history: Tensor | Sequence[Tensor], stage: int, alpha: Tensor) -> Tensor:
        """``h[last] + alpha z`` over the latest features of ``history``, in the stage given."""
        layer = self._layer(stage)
        latest = history[-layer.in_features :]
        if len(latest) == 0:
            raise ValueError("nothing can be predicted from an empty history; the first step must be full")
        window = latest if isinstance(latest, Tensor) else torch.stack(list(latest))
        weight = layer.weight[0, -len(window) :]
        if isinstance(layer, WindowKAN):
            return kan_predict(
                window,
                alpha.reshape(1, 1),
                weight[None],
                layer.base_weight[None, -len(window) :],
                layer.spline_weight[None, -len(window) :],
                layer.bias,
                scale=None if self.scale is None else self.scale.expand(window.shape[-1]),
                order=self.config.spline_order,
                grid_range=self.config.grid_range,
            )[0]
        # h[last] + alpha w.h is one sum with alpha added to the last weight, so the features are read once
        coefficients = alpha.reshape(1, 1) * weight + torch.eye(len(window), device=weight.device)[-1]
        bias = (alpha * layer.bias).reshape(1)
        wide = torch.promote_types(window.dtype, torch.float32)
        return combine(window, coefficients.to(wide), bias.to(wide))[0]

    def table(self, plan: StepPlan, times: Tensor | Sequence[float]) -> CoefficientTable:
        """The whole closed loop of a generation as one table over its full features, in float64.

        A predictor that was fitted on a stream which takes part in some steps only serves these steps of the schedule.

        Raises:
            ValueError: if the plan has another number of steps, or the schedule is not the one it was fitted on.
        """
        if self.config.latent == "kan":
            raise ValueError(
                "a KAN on the features is not linear in them and has no table; sample with it by lesa.enable"
            )
        first = self._first_of(plan, times)
        if first is not None:
            return self._in_part(plan, times, first)
        known = self.check_schedule(plan, times)
        exact = copy.deepcopy(self).to("cpu", torch.float64)
        with torch.no_grad():
            alphas = exact.gates(known)

        def rule(step: int, rows: list[Tensor]) -> Tensor:
            stage = self.config.stage(float(known[step]))
            layer = exact._layer(stage)
            window = torch.stack(rows[-layer.in_features :])
            z = layer.weight[0, -len(window) :] @ window
            z[-1] += layer.bias[0]  # the last entry of a row counts the constant 1
            return rows[-1] + alphas[step] * z

        with torch.no_grad():
            return unroll(plan, known, rule)

    def _first_of(self, plan: StepPlan, times: Tensor | Sequence[float]) -> int | None:
        """The step of a longer schedule where the times that it was fitted on begin; None: it does not hold them."""
        steps = self.config.num_steps
        if self.schedule is None or plan.num_steps <= steps:
            return None
        given = as_times(times, plan.num_steps)
        first = [i for i in range(plan.num_steps - steps + 1) if same_times(given[i : i + steps + 1], self.schedule)]
        return first[0] if first and first[0] <= plan.start < first[0] + steps else None

    def _in_part(self, plan: StepPlan, times: Tensor | Sequence[float], first: int) -> CoefficientTable:
        """The table of the steps from ``first`` on; what comes after them does not run, and is the latest feature."""
        assert self.schedule is not None
        own = self.table(plan.within(first, len(self.schedule) - 1), self.schedule)
        coefficients = torch.zeros(len(plan.predicted_steps), len(plan.full_steps), dtype=torch.float64)
        bias = coefficients.new_zeros(len(coefficients))
        rows, columns = own.coefficients.shape
        coefficients[:rows, :columns], bias[:rows] = own.coefficients, own.bias
        for row, step in zip(coefficients[rows:], plan.predicted_steps[rows:], strict=True):
            row[sum(full < step for full in plan.full_steps) - 1] = 1
        return CoefficientTable(plan, times, coefficients, bias)

    def check_schedule(self, plan: StepPlan, times: Tensor | Sequence[float]) -> Tensor:
        """The times in float64 [steps + 1], if this predictor can serve them.

        Raises:
            ValueError: if the plan has another number of steps, or the schedule is not the one it was fitted on.
        """
        steps = self.config.num_steps
        if plan.num_steps != steps:
            raise ValueError(
                f"this predictor was made for {steps} steps, the plan has {plan.num_steps}; sample {steps} steps with "
                f"a plan for as many, or fit a predictor for {plan.num_steps} steps"
            )
        known = as_times(times, steps)
        if self.schedule is not None and not same_times(known, self.schedule):
            raise ValueError(
                f"this predictor was fitted on another schedule of {steps} steps (another time shift, resolution or "
                f"solver), where its gates mean nothing: {difference(self.schedule, known)}. Sample as it was fitted, "
                "fit one on this schedule, or set predictor.schedule = None to try all the same"
            )
        return known

    def save_pretrained(
        self, save_directory: str | Path, *, report: Report | None = None, **options: Any
    ) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and a ``README.md`` that describes the predictor.

        Args:
            save_directory: the folder.
            report: rows as ``lesa demo`` writes them, or the file that holds them, for the README.md.
            options: those of :meth:`huggingface_hub.ModelHubMixin.save_pretrained`.

        Raises:
            ValueError: if the report is not a list of rows; nothing is written then.
            OSError: that names the file, if one cannot be written; an older predictor or this one is there then.
        """
        directory = Path(save_directory)
        described = {"report": report} | (options.pop("model_card_kwargs", None) or {})
        card = self.generate_model_card(**described)
        options.pop("config", None)  # config.json is always ours
        push, repository = options.pop("push_to_hub", False), options.pop("repo_id", None) or directory.name
        self._save_pretrained(directory)
        model_card.write(card, directory)
        return self.push_to_hub(repository, model_card_kwargs=described, **options) if push else None

    def push_to_hub(self, repo_id: str, *, report: Report | None = None, **options: Any) -> str:
        """:meth:`save_pretrained` into a repository of the Hugging Face Hub, which is made if there is none.

        Args:
            repo_id: such as ``"user/repo"``.
            report: rows as ``lesa demo`` writes them, or the file that holds them, for the README.md.
            options: those of :meth:`huggingface_hub.ModelHubMixin.push_to_hub`.
        """
        described = {"report": report, "name": repo_id} | (options.pop("model_card_kwargs", None) or {})
        return super().push_to_hub(repo_id, model_card_kwargs=described, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        _let_weights_say_what_they_are(save_directory)
        saving.write(save_directory, self.state_dict(), self._description())

    def _description(self) -> dict[str, Any]:
        """What config.json says."""
        return {
            "library": LIBRARY,
            "config": dataclasses.asdict(self.config),
            "schedule": None if self.schedule is None else self.schedule.tolist(),
            "plan": None if self.plan is None else dataclasses.asdict(self.plan),
            "losses": self.losses,
        }

    def generate_model_card(self, *args: Any, **options: Any) -> ModelCard:
        """The README.md; ``options`` are those of :func:`lesa.model_card.describe`."""
        header = self._hub_mixin_info.model_card_data.to_yaml()
        return ModelCard(f"---\n{header}\n---\n\n{model_card.describe(self, *args, **options)}")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "LesaPredictor":
        """Read what :meth:`save_pretrained` wrote or ``push_to_hub`` published.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the Hugging Face Hub where there is no folder of
                that name.
            options: ``revision``, ``token``, ``cache_dir``, ``force_download`` and ``local_files_only``, of a
                repository.

        Raises:
            FileNotFoundError: if it holds no predictor.
            ValueError: if a file is damaged or the weights belong to another configuration or predictor.
        """
        directory = local_folder(pretrained_model_name_or_path, **options)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (directory / name).is_file() and not (name == CONFIG_FILE and saving.repeated(directory)):
                raise FileNotFoundError(
                    f"{directory} holds no LESA predictor: {name} is missing; lesa.load reads folders with a predictor "
                    "for each branch"
                )
        try:
            description = saving.written(directory)
            made = _Described.of(description)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            what = f"{directory / CONFIG_FILE} does not describe a LESA predictor"
            raise ValueError(f"{what}: {f'{type(error).__name__} {error}'[:SHOWN]}") from error
        weights = _read_weights(directory / WEIGHTS_FILE, made.config)
        _check_pair(directory, made, description.keys())
        with torch.device("meta"):  # weights are not made only to be replaced: splines take a while to fit
            predictor = cls(made.config)
        if "scale" in weights:
            predictor.scale = weights["scale"]  # one number a channel, which the config does not know
        predictor.load_state_dict(weights, assign=True)
        predictor.plan, predictor.losses = made.plan, made.losses
        predictor.schedule = None if made.schedule is None else torch.tensor(made.schedule, dtype=torch.float64)
        return predictor


@dataclass(frozen=True)
class _Described:
    """What a description says, understood."""

    config: LesaConfig
    plan: StepPlan | None
    schedule: list[float] | None
    losses: dict[str, list[float]]

    @classmethod
    def of(cls, description: Any) -> "_Described":
        settings = dict(description["config"])
        if settings.pop("anchors", None) is not None:  # a setting of version 0.1
            raise ValueError("it has anchors, which this library no longer knows; fit a predictor for its schedule")
        config = LesaConfig(**settings)
        plan, schedule, losses = (description.get(key) for key in ("plan", "schedule", "losses"))
        return cls(
            config,
            None if plan is None else StepPlan(**plan),
            None if schedule is None else as_times(schedule, config.num_steps).tolist(),
            _curves(losses),
        )


def _check_pair(directory: Path, made: _Described, said: Collection[str]) -> None:
    """Complain of weights that say they are of another predictor than config.json does, in what it says."""
    repeated = saving.repeated(directory)
    if repeated is None:
        return
    try:
        other = _Described.of(repeated)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        path = directory / WEIGHTS_FILE
        raise ValueError(damaged(path, saving.KIND, f"{type(error).__name__} {error}")) from error
    names = [name for name in ("config", "schedule", "plan", "losses") if name in said]
    differing = [name for name in names if getattr(made, name) != getattr(other, name)]
    if differing:
        raise ValueError(
            f"{directory / CONFIG_FILE} has another {' and '.join(differing)} than the predictor whose weights are in "
            f"{WEIGHTS_FILE}; save it again, or remove {CONFIG_FILE} to go by what the weights say"
        )


def _let_weights_say_what_they_are(directory: Path) -> None:
    """Those of an older predictor get its description, without which they would be lost if config.json was removed."""
    if not (directory / CONFIG_FILE).is_file() or saving.repeated(directory) is not None:
        return
    try:
        old = LesaPredictor.from_pretrained(directory)
    except (ValueError, FileNotFoundError):  # nothing to lose
        return
    saving.write_weights(directory, old.state_dict(), old._description())


def _curves(losses: Any) -> dict[str, list[float]]:
    """What was written of a training."""
    if losses is None:
        return {}
    if not isinstance(losses, dict) or not all(isinstance(curve, list) for curve in losses.values()):
        raise ValueError("losses must have a list for each stage")
    return {stage: [real("a loss", loss) for loss in curve] for stage, curve in losses.items()}


def _numbers(name: str, values: Any, count: int | None = None) -> tuple[float, ...]:
    """Finite numbers, as many as wanted."""
    if not isinstance(values, Sequence) or isinstance(values, str) or (count is not None and len(values) != count):
        raise ValueError(f"{name} must be {'numbers' if count is None else f'{count} numbers'}, not {values!r:.80}")
    return tuple(real(f"each of {name}", value) for value in values)


def _read_weights(path: Path, config: LesaConfig) -> dict[str, Tensor]:
    """The weights in a file, if they are those of this configuration; nothing is read or made room for otherwise."""
    try:
        with safe_open(str(path), "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
            scale = shapes.pop("scale", None) if config.latent == "kan" else None
            config.check_shapes(shapes)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {str(error)[:SHOWN]}") from error
    except ValueError as error:
        raise ValueError(f"the weights in {path} belong to another configuration: {str(error)[:SHOWN]}") from error
    weights = read_tensors(path, kind=saving.KIND).tensors
    try:
        dtype = check_tensor(weights, "latent.0.weight", shapes["latent.0.weight"], dtypes=FLOATS).dtype
        for name, shape in {**shapes, **({} if scale is None else {"scale": scale})}.items():
            check_tensor(weights, name, shape, dtypes=(dtype,) if not name.endswith(".grid") else FLOATS)
            if name.endswith(".grid") and not bool((weights[name].diff() > 0).all()):
                raise ValueError(f"the knots of {name} do not rise")
    except ValueError as error:
        raise ValueError(damaged(path, saving.KIND, error)) from error
    return weights
