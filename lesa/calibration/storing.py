"""The file of a calibration, and the checks of what it holds."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lesa.arguments import real, whole
from lesa.calibration.measured import Measured
from lesa.files import TensorFile, check_tensor, read_tensors, write_tensors
from lesa.files.hub import CALIBRATION_FILE
from lesa.files.tensors import damaged
from lesa.statistics.gram import GramMatrix
from lesa.statistics.output_errors import OutputErrorGram
from lesa.tables.forecaster import Stream
from lesa.tables.plan import StepPlan
from lesa.tables.times import as_times

KIND = "calibration"
Streams = dict[Stream, Measured]


def file_of(path: str | Path) -> Path:
    """The file, where a folder was given."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / CALIBRATION_FILE


def save(path: Path, times: Tensor, streams: Streams, plans: list[StepPlan], fields: dict[str, Any]) -> None:
    """Write a calibration; ``fields`` are what JSON can hold of it.

    Raises:
        OSError: that names the file, if it cannot be written.
    """
    tensors: dict[str, Tensor] = {"times": times}
    counts = {}
    for (component, branch), measured in streams.items():
        name = f"{component}.{branch}"
        tensors |= {f"{name}.{part}": tensor for part, tensor in measured.gram.tensors().items()}
        head = measured.output_errors
        if head is not None:
            tensors |= {f"{name}.errors": head.vectors, f"{name}.lengths": head.lengths, f"{name}.power": head.squares}
            counts[name] = [head.count, head.tokens]
    description = {
        "streams": [list(stream) for stream in streams],
        "counts": counts,
        "steps": len(times) - 1,
        "ranges": [[measured.first, measured.gram.num_steps] for measured in streams.values()],
        "plans": [plan.full_steps for plan in plans],
        **fields,
    }
    write_tensors(path, tensors, description, kind=KIND)


def load(path: Path) -> tuple[Tensor, Streams, dict[str, Any]]:
    """Times, statistics of each stream, and the other fields of a calibration.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or something else; it names the file.
    """
    file = read_tensors(path, kind=KIND)
    try:
        return _understand(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(damaged(path, KIND, error)) from error


def _understand(file: TensorFile) -> tuple[Tensor, Streams, dict[str, Any]]:
    description = file.description
    if not isinstance(description, dict):
        raise ValueError("its header does not describe one")
    given = check_tensor(file.tensors, "times", (None,))
    steps = len(given) - 1
    whole("the number of steps", steps, least=1)
    if description.get("steps") != steps:
        raise ValueError(f"it has {steps} times, and says that it is of {description.get('steps')!r:.20} steps")
    times = as_times(given, steps)
    if not (float(times[-1]) >= 0 and float(times[0]) <= 1 + 1e-3):
        raise ValueError(f"times are noise levels from 1 to 0, these are {float(times[0]):g} to {float(times[-1]):g}")
    streams = [_stream(item) for item in _list(description, "streams")]
    if not streams or len(set(streams)) != len(streams):
        raise ValueError("streams must be there, each once")
    counts = description.get("counts")
    ranges = [_range(item, steps) for item in _list(description, "ranges")]
    if len(ranges) != len(streams):
        raise ValueError("ranges must have the first step and the number of steps of each stream")
    parts = {
        stream: _measured(file.tensors, stream, first, count, counts)
        for stream, (first, count) in zip(streams, ranges, strict=True)
    }
    return times, parts, _fields(description, steps)


def _measured(tensors: dict[str, Tensor], stream: Stream, first: int, steps: int, counts: Any) -> Measured:
    name = ".".join(stream)
    check_tensor(tensors, f"{name}.gram", (steps + 1, steps + 1))
    try:
        gram = GramMatrix.of({"gram": tensors[f"{name}.gram"]})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if f"{name}.errors" not in tensors:
        return Measured(gram, None, first)
    vectors = check_tensor(tensors, f"{name}.errors", (steps, steps, None))
    lengths = check_tensor(tensors, f"{name}.lengths", (steps, steps))
    power = check_tensor(tensors, f"{name}.power", (steps,))
    if not isinstance(counts, dict) or not isinstance(counts.get(name), list) or len(counts[name]) != 2:
        raise ValueError(f"counts must have two numbers for {name}")
    count, tokens = (real(f"counts of {name}", number, above=0) for number in counts[name])
    if tokens > count:
        raise ValueError(
            f"counts of {name} are output values and tokens, of which there are not more: {count}, {tokens}"
        )
    if bool((power < 0).any()):
        raise ValueError(f"{name}: sums of squares cannot be negative")
    return Measured(gram, OutputErrorGram(vectors, lengths, power, count, tokens), first)


def _fields(description: dict[str, Any], steps: int) -> dict[str, Any]:
    model = description.get("model")
    if not isinstance(model, dict) or not all(isinstance(text, str) for text in model.values()):
        raise ValueError("model must name the class of each transformer")
    requests = _list(description, "requests")
    if not all(isinstance(request, str) for request in requests):
        raise ValueError("requests must be names")
    settings = description.get("settings")
    if not isinstance(settings, dict):
        raise ValueError("settings must be a mapping")
    plans = [StepPlan(steps, full) for full in _list(description, "plans")]
    return {
        "model": model,
        "settings": settings,
        "requests": requests,
        "samples": whole("samples", description.get("samples"), least=0),
        "token_error": real("token_error", description.get("token_error"), least=0),
        "plans": {len(plan.full_steps): plan for plan in plans},
    }


def _list(description: dict[str, Any], name: str) -> list[Any]:
    value = description.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list")
    return value


def _range(item: Any, steps: int) -> tuple[int, int]:
    if not isinstance(item, list) or len(item) != 2:
        raise ValueError("ranges must be pairs of a first step and a number of steps")
    first = whole("the first step of a stream", item[0], least=0, most=steps - 1)
    return first, whole("the number of steps of a stream", item[1], least=1, most=steps - first)


def _stream(item: Any) -> Stream:
    if not isinstance(item, list) or len(item) != 2 or not all(isinstance(part, str) for part in item):
        raise ValueError("streams must be pairs of a component and a branch")
    return item[0], item[1]
