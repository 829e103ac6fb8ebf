"""``load``, ``save`` and ``push_to_hub``: predictors and calibrations in folders and repositories.

folder/config.json, folder/model.safetensors                        a predictor
folder/calibration.safetensors                                      a calibration
folder/transformer.cond/..., folder/transformer.uncond/...          one for each (component, branch)
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from lesa.calibration.calibration import Calibration
from lesa.files.hub import CALIBRATION_FILE, CONFIG_FILE, WEIGHTS_FILE, local_folder
from lesa.predictor import model_card
from lesa.predictor.model_card import Report
from lesa.predictor.predictor import LesaPredictor
from lesa.tables.forecaster import Forecaster, Stream

# The file that says what a folder holds, and the function that reads it.
READERS: dict[str, Callable[[Path], LesaPredictor | Calibration]] = {
    CONFIG_FILE: LesaPredictor.from_pretrained,
    CALIBRATION_FILE: Calibration.load,
    WEIGHTS_FILE: LesaPredictor.from_pretrained,  # without config.json: saving was interrupted
}


def load(name: str | Path, **options: Any) -> Forecaster | Calibration | dict[Stream, Forecaster]:
    """Read a folder or a repository of the Hugging Face Hub, for :func:`lesa.enable`.

    Args:
        name: a folder that :func:`save`, ``save_pretrained``, ``lesa fit`` or ``lesa convert`` wrote, or the repository
            it was pushed to, such as ``"user/repo"``. If a folder of that name exists, the network is not used.
        options: ``revision``, ``token``, ``cache_dir``, ``force_download`` and ``local_files_only``, of a repository.

    Returns:
        One forecaster, one for each (component, branch), or a calibration, which has one for each.

    Raises:
        FileNotFoundError: if there is neither folder nor repository, or nothing of lesa in it.
        ValueError: if a file is damaged, or there is both one predictor and one for each branch.
    """
    folder = local_folder(name, **options)
    whole = _read(folder)
    if whole is not None:
        part = next((part for part in sorted(folder.iterdir()) if _stream(part) and _holds_predictor(part)), None)
        if part is not None and _holds_predictor(folder):
            raise ValueError(
                f"{folder} holds both a predictor and one for each branch, such as {part.name}; remove those that are "
                f"not meant, or load one by LesaPredictor.from_pretrained"
            )
        return whole
    parts = {stream: _read(part) for part in sorted(folder.iterdir()) if (stream := _stream(part)) is not None}
    found: dict[Stream, Forecaster] = {stream: part for stream, part in parts.items() if isinstance(part, Forecaster)}
    if not found:
        raise FileNotFoundError(
            f"{folder} holds nothing that lesa has written: it should have {CONFIG_FILE} or {CALIBRATION_FILE}, or a "
            "folder such as transformer.cond that has"
        )
    return found


def save(
    predictors: LesaPredictor | Mapping[Stream, LesaPredictor], directory: str | Path, *, report: Report | None = None
) -> None:
    """Write one predictor, or one for each (component, branch), with a README.md that describes them.

    Args:
        predictors: what :func:`lesa.fit` or :func:`lesa.load_official` returned, or a mapping of such.
        directory: the folder; :func:`load` reads it.
        report: rows as ``lesa demo`` writes them, or the file that holds them, for the README.md.

    Raises:
        ValueError: if there are none, or a stream has no component and branch.
    """
    _save(predictors, Path(directory), report, None)


def push_to_hub(
    predictors: LesaPredictor | Mapping[Stream, LesaPredictor],
    repository: str,
    *,
    report: Report | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload predictor",
) -> str:
    """:func:`save` into a repository of the Hugging Face Hub, which is made if there is none.

    Returns:
        The address of the commit.
    """
    api = HfApi(token=token)
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        _save(predictors, Path(folder), report, repository)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return str(commit)


def _save(
    predictors: LesaPredictor | Mapping[Stream, LesaPredictor], directory: Path, report: Report | None, name: str | None
) -> None:
    if isinstance(predictors, LesaPredictor):
        predictors.save_pretrained(directory, report=report, model_card_kwargs={"name": name})
        return
    folders = {stream: directory / ".".join(stream) for stream in predictors}
    if not folders or any(_stream(folder) != stream for stream, folder in folders.items()):
        raise ValueError(f"predictors are saved by (component, branch), not {list(predictors)}")
    first = next(iter(predictors.values()))
    card = first.generate_model_card(report=report, name=name, streams=list(predictors))
    for stream, predictor in predictors.items():
        predictor.save_pretrained(folders[stream])
    model_card.write(card, directory)


def _holds_predictor(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() or (folder / WEIGHTS_FILE).is_file()


def _read(folder: Path) -> LesaPredictor | Calibration | None:
    return next((read(folder) for file, read in READERS.items() if (folder / file).is_file()), None)


def _stream(folder: Path) -> Stream | None:
    """(component, branch) from the name of a folder, ``component.branch``."""
    component, dot, branch = folder.name.partition(".")
    is_stream = component.isidentifier() and branch.isidentifier() and bool(dot)
    return (component, branch) if is_stream else None
