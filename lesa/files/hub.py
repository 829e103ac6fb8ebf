"""Folders of this machine and repositories of the Hugging Face Hub, by one name.

A repository is only asked for where no folder of that name exists, and only files that may be ours are fetched: first
the descriptions, which are a few kilobytes, then the weights that belong to them. What was fetched once is found
offline.
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CALIBRATION_FILE = "calibration.safetensors"
LIBRARY = "lesa"
# at the root, or one folder for each (component, branch), whose name has a dot where those of a pipeline have none
DESCRIPTIONS = [CONFIG_FILE, f"*.*/{CONFIG_FILE}", CALIBRATION_FILE]
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local_folder(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder of this name, or what a repository of the hub holds for lesa, fetched into its cache.

    Args:
        name: a folder, or a repository such as ``"user/repo"``. A :class:`Path` is always a folder.
        revision: branch, tag or commit of the repository.
        token: for a private repository; None: of the login.
        cache_dir, force_download: where the cache is, and whether to fetch again.
        local_files_only: take what the cache has.

    Raises:
        FileNotFoundError: if there is neither, or the hub cannot be asked.
        ValueError: if the repository holds nothing of lesa; no weights are fetched then.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(
            f"{name} is a file; give its folder, or read a checkpoint of the authors by lesa.load_official"
        )
    if isinstance(name, Path) or not REPOSITORY.fullmatch(name):
        raise FileNotFoundError(f"there is no folder {name}")
    options: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "force_download": force_download,
        "local_files_only": local_files_only or constants.HF_HUB_OFFLINE,  # huggingface_hub 1.33 asks the hub otherwise
    }
    fetched = _fetch(name, DESCRIPTIONS, revision=revision, **options)
    described = [path.parent for path in sorted(fetched.rglob(CONFIG_FILE)) if path.is_file() and _is_ours(path)]
    if not described and not (fetched / CALIBRATION_FILE).is_file():
        raise ValueError(f"the repository {name} of the Hugging Face Hub holds nothing that lesa has written")
    weights = [(parent / WEIGHTS_FILE).relative_to(fetched).as_posix() for parent in described]
    # the folder of a fetched repository is called as the commit, which may no longer be the latest
    return _fetch(name, weights, revision=fetched.name, **options) if weights else fetched


def _fetch(name: str, patterns: list[str], **options: Any) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **options))
    except (EntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and no such repository of the Hugging Face Hub on this machine; with a "
            f"connection, and without HF_HUB_OFFLINE or local_files_only, it would be fetched ({_first_line(error)})"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and the Hugging Face Hub does not give out a repository {name}; if it is "
            f"private or gated, log in with 'hf auth login' ({_first_line(error)})"
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"there is no folder {name}, nor can a repository be called so ({error})") from error


def _is_ours(config: Path) -> bool:
    try:
        description = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(description, dict) and description.get("library") == LIBRARY


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
