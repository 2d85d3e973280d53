"""Adapter: checkpoints from a model hub through huggingface_hub.

A node downloads a commit once: whoever comes first holds a file lock, a marker says that every file is there,
and from then on the network is not used. Only safetensors, JSON configuration and tokenizer files are taken.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.checkpoint.headers import FileHeader, parse_header
from cluster.checkpoint.layout import CONFIG_FILE, GENERATION_CONFIG_FILE, INDEX_FILE, TOKENIZER_FILES
from cluster.checkpoint.manifest import MANIFEST_FILE
from cluster.domain.errors import CheckpointError, ConfigError

# A download that another process of this node holds for longer than this is stuck.
LOCK_DEADLINE_S = 6 * 3600.0
# Most headers lie within the first request. A large checkpoint has some hundred files.
FIRST_REQUEST_BYTES = 128 * 1024
HEADER_DEADLINE_S = 30.0
MAX_HEADER_REQUESTS = 8
_SMALL_FILES = frozenset({CONFIG_FILE, GENERATION_CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, *TOKENIZER_FILES})


class HubError(CheckpointError):
    """The hub could not be reached, and this machine has no complete copy."""


def resolve_commit(repo_id: str, revision: str) -> str:
    """The commit that ``revision`` means now; without network the one it meant last time on this machine."""
    remembered = _state(repo_id) / "refs" / revision.replace("/", "--")
    try:
        commit = str(_call(repo_id, lambda api: api.model_info(repo_id, revision=revision, timeout=30).sha))
    except HubError:
        if remembered.is_file():
            return remembered.read_text().strip()
        raise
    remembered.parent.mkdir(parents=True, exist_ok=True)
    remembered.write_text(commit)
    return commit


def download(
    repo_id: str, commit: str, *, weights: bool = True, progress: Callable[[int, int], None] | None = None
) -> Path:
    """The directory with ``repo_id`` at ``commit``; ``progress`` hears (bytes here, bytes in all)."""
    import filelock

    state = _state(repo_id)
    state.mkdir(parents=True, exist_ok=True)
    marker = state / f"{commit}.{'complete' if weights else 'config'}"
    found = _marked(marker)
    if found is not None:
        return found
    try:
        with filelock.FileLock(state / f"{commit}.lock", timeout=LOCK_DEADLINE_S):
            found = _marked(marker)  # somebody else may have finished while we waited
            if found is not None:
                return found
            directory = _download_files(repo_id, commit, weights=weights, progress=progress)
            marker.write_text(json.dumps({"directory": str(directory)}))
            return directory
    except filelock.Timeout:
        raise HubError(f"Another process has been downloading {repo_id} for hours; end it and try again.") from None


def complete_copy(repo_id: str, commit: str) -> Path | None:
    """The directory with all of ``commit``, if it has been downloaded to this machine."""
    return _marked(_state(repo_id) / f"{commit}.complete")


def read_headers(repo_id: str, commit: str) -> dict[str, FileHeader]:
    """The headers of the weights by file name, through ranged requests: not one weight is fetched."""
    weights = {name: size for name, size in _wanted_files(repo_id, commit).items() if name.endswith(".safetensors")}

    def read(name: str) -> FileHeader:
        def ask(_api: Any) -> FileHeader:
            return parse_header(Path(repo_id) / name, weights[name], _Beginning(repo_id, name, commit).read)

        found: FileHeader = _call(repo_id, ask)
        return found

    with ThreadPoolExecutor(MAX_HEADER_REQUESTS) as pool:
        return dict(zip(weights, pool.map(read, weights), strict=True))


class _Beginning:
    """A file on the hub, read from its first byte on; each request asks for what was asked so far."""

    def __init__(self, repo_id: str, name: str, commit: str) -> None:
        from huggingface_hub import hf_hub_url

        self._url = hf_hub_url(repo_id, name, revision=commit)
        self._here, self._read = b"", 0

    def read(self, count: int) -> bytes:
        end = self._read + count
        if len(self._here) < end:
            self._here = self._first(max(end, FIRST_REQUEST_BYTES))
        start, self._read = self._read, end
        return self._here[start:end]

    def _first(self, count: int) -> bytes:
        """The first ``count`` bytes, or all there are; a server that knows no ranges is left early."""
        import huggingface_hub.utils

        utils: Any = huggingface_hub.utils
        headers = utils.build_hf_headers() | {"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
        found = bytearray()
        with utils.get_session().stream("GET", self._url, headers=headers, timeout=HEADER_DEADLINE_S) as response:
            if response.is_error:
                response.read()
            utils.hf_raise_for_status(response)
            for chunk in response.iter_bytes():
                found += chunk
                if len(found) >= count:
                    break
        return bytes(found[:count])


def _download_files(repo_id: str, commit: str, *, weights: bool, progress: Callable[[int, int], None] | None) -> Path:
    wanted = _wanted_files(repo_id, commit, weights=weights)
    total, here = sum(wanted.values()), 0
    directory = Path()
    for name, size in sorted(wanted.items()):
        bar = _progress_bar(here, total, progress)
        ask = functools.partial(_download_one, repo_id=repo_id, name=name, commit=commit, bar=bar)
        file: str = _call(repo_id, ask)
        directory = Path(file).parent
        here += size
        if progress is not None:
            progress(here, total)
    return directory


def _wanted_files(repo_id: str, commit: str, *, weights: bool = True) -> dict[str, int]:
    """Bytes of each file that a model is made of."""
    siblings = _call(repo_id, lambda api: api.model_info(repo_id, revision=commit, files_metadata=True)).siblings or []
    wanted = {s.rfilename: int(s.size or 0) for s in siblings if _wanted(s.rfilename, weights=weights)}
    if CONFIG_FILE not in wanted:
        raise CheckpointError(f"{repo_id} has no {CONFIG_FILE}; it is not a model in Hugging Face layout.")
    if weights and not any(name.endswith(".safetensors") for name in wanted):
        raise CheckpointError(f"{repo_id} has no safetensors weights; convert them with transformers and upload those.")
    return wanted


def _download_one(_api: Any, *, repo_id: str, name: str, commit: str, bar: Any) -> str:
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(repo_id, name, revision=commit, tqdm_class=bar))


def _wanted(name: str, *, weights: bool) -> bool:
    return "/" not in name and (name in _SMALL_FILES or (weights and name.endswith(".safetensors")))


def _progress_bar(here: int, total: int, progress: Callable[[int, int], None] | None) -> Any:
    """A silent progress bar class that forwards the bytes of one file to ``progress``."""
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils

    class Forwarding(utils.tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = True  # the terminal is the caller's
            self._bytes = 0
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> Any:
            self._bytes += int(n or 0)
            if progress is not None:
                progress(min(total, here + self._bytes), total)
            return super().update(n)

    return Forwarding


def _marked(marker: Path) -> Path | None:
    try:
        directory = Path(json.loads(marker.read_text())["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return directory if directory.is_dir() else None


def _state(repo_id: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / ".llm-cluster" / repo_id.replace("/", "--")


def _call(repo_id: str, ask: Callable[[Any], Any]) -> Any:
    """``ask`` the hub's API; its errors become ours here."""
    from huggingface_hub import HfApi, errors

    # The HTTP library under the hub's client changes with its major version; its root error keeps its name there.
    library: Any = errors
    http_error: type[Exception] = library.HTTPError
    try:
        return ask(HfApi())
    except errors.GatedRepoError:
        raise ConfigError(f"{repo_id} is gated; accept its licence on the hub and set HF_TOKEN.") from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{repo_id} has no such revision on the hub; check --revision.") from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"The hub has no model {repo_id}; check the name (and HF_TOKEN if it is private), or give a directory."
        ) from None
    except (http_error, errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise HubError(
            f"The hub could not be asked for {repo_id} ({type(error).__name__}); "
            "check the network, or download the model and give its directory."
        ) from error
