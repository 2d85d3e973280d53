"""Digests of a checkpoint's weights, chunk by chunk, so that whoever reads a slice verifies exactly what it read.

The manifest is one JSON file beside the shards. Each file is cut into chunks of ``chunk_bytes``, the last one shorter,
and every chunk has its sha256. A rank that reads a slice reads whole chunks and compares them while they stream past:
no second read, and no rank waits for another's verdict.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.domain.errors import CheckpointError

MANIFEST_FILE = "model.safetensors.manifest.json"
CHUNK_BYTES = 4 * 2**20
# A chunk is held whole by each stream that reads; pages of 4 KiB are what storage delivers.
_LEAST_CHUNK, _GREATEST_CHUNK, _PAGE = 64 * 2**10, 16 * 2**20, 4096
# A terabyte in chunks of 4 MiB takes 17 MB of JSON.
_MAX_BYTES = 512 * 2**20
_AGAIN = "say 'llm-cluster manifest' on files known to be good to write it anew"

# Bytes done, bytes in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class FileDigests:
    """One file: ``size`` bytes, and the sha256 of each chunk of ``chunk_bytes`` in lower-case hexadecimal digits."""

    size: int
    chunk_bytes: int
    sha256: tuple[str, ...]

    def check(self, file: Path, chunk: int, content: bytes | memoryview) -> None:
        """CheckpointError with the file's name unless ``content`` is chunk number ``chunk``."""
        if hashlib.sha256(content).hexdigest() != self.sha256[chunk]:
            first = chunk * self.chunk_bytes
            raise CheckpointError(
                f"{file} is damaged: bytes {first} to {first + len(content)} do not have the sha256 of "
                f"{MANIFEST_FILE}; download or copy this file again."
            )


def read_manifest(directory: Path) -> dict[str, FileDigests] | None:
    """Digests by file name; None without a manifest, CheckpointError when it is not a valid one."""
    path = directory / MANIFEST_FILE
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_BYTES} bytes; it cannot be a manifest: delete it.")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON; {_AGAIN}.") from None
    return _parse(path, content)


def _parse(path: Path, content: Any) -> dict[str, FileDigests]:
    if not isinstance(content, dict) or content.get("algorithm") != "sha256":
        raise CheckpointError(f"{path} does not say that its algorithm is sha256; {_AGAIN}.")
    chunk_bytes, files = content.get("chunk_bytes"), content.get("files")
    if type(chunk_bytes) is not int or not _LEAST_CHUNK <= chunk_bytes <= _GREATEST_CHUNK or chunk_bytes % _PAGE:
        raise CheckpointError(
            f"{path} has no chunk_bytes from {_LEAST_CHUNK} to {_GREATEST_CHUNK} in steps of {_PAGE}; {_AGAIN}."
        )
    if not isinstance(files, dict):
        raise CheckpointError(f"{path} lists no files; {_AGAIN}.")
    return {name: _digests(path, name, entry, chunk_bytes) for name, entry in files.items()}


def _digests(path: Path, name: str, entry: Any, chunk_bytes: int) -> FileDigests:
    size = entry.get("size") if isinstance(entry, dict) else None
    sha256 = entry.get("sha256") if isinstance(entry, dict) else None
    if type(size) is not int or size < 0 or not isinstance(sha256, list):
        raise CheckpointError(f"{path}: {name} has no size and sha256; {_AGAIN}.")
    if len(sha256) != -(-size // chunk_bytes) or not all(isinstance(s, str) and len(s) == 64 for s in sha256):
        raise CheckpointError(f"{path}: {name} does not have one sha256 for every {chunk_bytes} bytes; {_AGAIN}.")
    return FileDigests(size, chunk_bytes, tuple(sha256))


def require_sizes(directory: Path, digests: Mapping[str, FileDigests], sizes: Mapping[str, int]) -> None:
    """CheckpointError with the file's name unless every file of ``sizes`` is listed with that size."""
    for name, size in sizes.items():
        if name not in digests:
            raise CheckpointError(f"{directory / MANIFEST_FILE} does not list {name}; {_AGAIN}.")
        if digests[name].size != size:
            raise CheckpointError(
                f"{directory / name} has {size} bytes, but {MANIFEST_FILE} says {digests[name].size}; "
                "download or copy this file again."
            )


def write_manifest(
    directory: Path, files: tuple[Path, ...], progress: Progress, *, chunk_bytes: int = CHUNK_BYTES, streams: int = 4
) -> Path:
    """Reads ``files`` of ``directory`` once, in ``streams`` threads, and puts the manifest there; returns its path."""
    sizes = {}
    for file in files:
        with _readable(file):
            sizes[file] = file.stat().st_size
    found = {
        file.name: {"size": size, "sha256": sha256}
        for (file, size), sha256 in zip(
            sizes.items(), _hash_files(sizes, chunk_bytes, streams, _hash, progress), strict=True
        )
    }
    path = directory / MANIFEST_FILE
    content = {"algorithm": "sha256", "chunk_bytes": chunk_bytes, "files": found}
    _replace(path, json.dumps(content, indent=1))
    return path


def verify(directory: Path, digests: Mapping[str, FileDigests], progress: Progress, *, streams: int = 4) -> None:
    """Reads every listed file whole; CheckpointError for the first one that is missing or differs."""
    sizes = {directory / name: digest.size for name, digest in digests.items()}
    for file, size in sizes.items():
        with _readable(file):
            if not file.is_file():
                raise CheckpointError(f"{file} is not there, but {MANIFEST_FILE} lists it; copy it into the directory.")
            require_sizes(directory, digests, {file.name: file.stat().st_size})
        assert size == digests[file.name].size
    chunk_bytes = next(iter(digests.values())).chunk_bytes if digests else CHUNK_BYTES
    for _ in _hash_files(sizes, chunk_bytes, streams, partial(_compare, digests), progress):
        pass


def _hash(_file: Path, _chunk: int, content: memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _compare(digests: Mapping[str, FileDigests], file: Path, chunk: int, content: memoryview) -> str:
    digests[file.name].check(file, chunk, content)
    return digests[file.name].sha256[chunk]


def _hash_files(
    sizes: Mapping[Path, int],
    chunk_bytes: int,
    streams: int,
    one: Callable[[Path, int, memoryview], str],
    progress: Progress,
) -> Iterator[list[str]]:
    """For each file what ``one`` makes of its chunks. hashlib and preadv let other threads run meanwhile."""
    done, total = 0, sum(sizes.values())
    with ThreadPoolExecutor(streams, thread_name_prefix="digest") as pool:
        for file, size in sizes.items():
            results = []
            with _opened(file) as descriptor:
                chunks = range(-(-size // chunk_bytes))
                for result in pool.map(partial(_read_chunk, file, descriptor, size, chunk_bytes, one), chunks):
                    results.append(result)
                    done += min(chunk_bytes, size - (len(results) - 1) * chunk_bytes)
                    progress(done, total)
            yield results


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """CheckpointError with the file's name where the system does not let it be read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); check its permissions and its disk."
        ) from None


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    """A descriptor to read ``file`` with; what breaks meanwhile is told with its name."""
    with _readable(file):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _read_chunk(
    file: Path,
    descriptor: int,
    size: int,
    chunk_bytes: int,
    one: Callable[[Path, int, memoryview], str],
    chunk: int,
) -> str:
    first = chunk * chunk_bytes
    length = min(chunk_bytes, size - first)
    with mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as buffer, memoryview(buffer) as view:
        filled = 0
        while filled < length:
            count = os.preadv(descriptor, [view[filled:]], first + filled)
            if count == 0:
                raise CheckpointError(f"{file} ends at byte {first + filled} while it is read; copy it again.")
            filled += count
        return one(file, chunk, view)


def _replace(path: Path, text: str) -> None:
    """A reader sees the old manifest or the new one, never half of one."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as stream:
            stream.write(text + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary = Path(stream.name)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}); check the directory's permissions."
        ) from None
