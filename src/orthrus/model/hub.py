"""Finding a checkpoint's folder: a local one as it is, the Hub's through huggingface_hub's cache."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from orthrus.model.tensors import INDEX, SINGLE, weight_map

DOWNLOAD_OPTIONS = ("cache_dir", "token", "local_files_only", "force_download")
"""huggingface_hub's options that loading passes on."""
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken")
"""Everything but weights: configuration, tokenizer, chat template, index of shards."""


def find_folder(source: str | os.PathLike, *, weights: bool, revision: str | None = None, **options: Any) -> Path:
    """The folder of a checkpoint: a local one as it is, or the Hub's, downloaded; `ValueError` when there is neither.

    `options` are huggingface_hub's `cache_dir`, `token`, `local_files_only` and `force_download`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision not in (None, "main"):
            raise ValueError(f"revision {revision!r} names a commit on the Hub, but {source} is a folder")
        return path
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)) is not None
    if not is_hub_id or path.exists():
        raise ValueError(f"{source} is neither a folder nor a model id of the Hub")
    folder = download(str(source), SMALL_FILES, revision=revision, **options)
    if not weights:
        return folder
    # The index says which files belong to the model: repositories may hold other formats beside them.
    names = set(weight_map(folder).values()) if (folder / INDEX).is_file() else {SINGLE}
    return download(str(source), sorted(names), revision=commit_of(folder) or revision, **options)


def download(repo_id: str, patterns: Iterable[str], *, revision: str | None, **options: Any) -> Path:
    """A Hub snapshot's folder; one clear `ValueError` for whatever stands in the way."""
    try:
        folder = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns), **options)
    except (OSError, HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"no folder and no downloadable model called {repo_id!r}{at}: {type(error).__name__}: {reason}"
        ) from error
    return Path(folder)


def commit_of(folder: Path) -> str | None:
    """The commit of a Hub snapshot's folder, None for any other."""
    is_commit = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if is_commit else None
