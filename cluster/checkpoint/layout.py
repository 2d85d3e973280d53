"""A checkpoint directory in Hugging Face layout: what is in it, and whether its files agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.checkpoint.headers import FileHeader, TensorHeader, read_header
from cluster.checkpoint.manifest import read_manifest, require_sizes
from cluster.checkpoint.transformers_types import CLASS_BY_MODEL_TYPE
from cluster.domain.errors import CheckpointError, UnsupportedModelError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
# Many published checkpoints name Python code of their own (auto_map), from before transformers had them; these are in
# our own tree, or published under an older name. The code in the checkpoint is passed over.
IN_OUR_TREE = frozenset({"RefinedWeb", "RefinedWebModel", "openelm", "phi3small"})
# A JSON file of a checkpoint that is larger than this is something else.
_MAX_JSON_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model on disk. ``tensors``: name -> header (which names its file); ``files``: shards, sorted.

    ``digest`` is the sha256 over config.json, generation_config.json, the tokenizer files and, for every
    shard, its name, header and size. It tells two checkpoints apart that differ in shape, configuration
    or text; it does not read the weights, so it costs milliseconds and does not detect flipped bits in them. That is
    what the manifest is for, whose digests the tensors' headers carry; it is no part of ``digest``, so that a manifest
    can be added to a checkpoint that is being served.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    tensors: dict[str, TensorHeader]
    files: tuple[Path, ...]
    total_bytes: int
    tokenizer_files: tuple[Path, ...]
    digest: str

    @property
    def nbytes_by_name(self) -> dict[str, int]:
        """Stored bytes of every tensor: what ``planner.plan`` takes as ``weights_nbytes_by_name``."""
        return {name: tensor.nbytes for name, tensor in self.tensors.items()}


def read_checkpoint(
    path: Path, elsewhere: Mapping[str, FileHeader] | None = None, *, manifest: bool = True
) -> Checkpoint:
    """The checkpoint in directory ``path``; CheckpointError or UnsupportedModelError with the fix otherwise.

    ``elsewhere``: headers by file name of weights that are not in ``path``. The digest is the same as where they are.
    ``manifest``: whether to heed one that is there.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give the directory that holds {CONFIG_FILE}.")
    config = read_config(path)
    refuse_custom_code(path, config)
    generation_config = _optional_json(path / GENERATION_CONFIG_FILE)
    files = weight_files(path) if elsewhere is None else _weight_files(path, frozenset(elsewhere))
    headers = tuple(read_header(file) if elsewhere is None else elsewhere[file.name] for file in files)
    tensors = _tensors_by_name(path, headers)
    if manifest:
        tensors = _with_digests(path, headers, tensors)
    tokenizer_files = find_tokenizer_files(path)
    return Checkpoint(
        path=path,
        config=config,
        generation_config=generation_config,
        tensors=tensors,
        files=tuple(header.file for header in headers),
        total_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        tokenizer_files=tokenizer_files,
        digest=digest_of(path, tokenizer_files, headers),
    )


def weight_files(path: Path) -> tuple[Path, ...]:
    """The shards in directory ``path``; CheckpointError where some are missing."""
    return _weight_files(path, {file.name for file in path.iterdir() if file.is_file()})


def find_tokenizer_files(path: Path) -> tuple[Path, ...]:
    """Those of ``TOKENIZER_FILES`` that directory ``path`` has."""
    return tuple(path / name for name in TOKENIZER_FILES if (path / name).is_file())


def read_config(path: Path) -> dict[str, Any]:
    """config.json of directory ``path``, or the file ``path`` itself."""
    file = path / CONFIG_FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path} has no {CONFIG_FILE}; a model is a directory in Hugging Face layout.")
    return _json(file)


def read_generation_config(path: Path) -> dict[str, Any] | None:
    """generation_config.json of directory ``path``, None when there is none."""
    return _optional_json(path / GENERATION_CONFIG_FILE)


def refuse_custom_code(path: Path, config: dict[str, Any]) -> None:
    """UnsupportedModelError when ``config`` names Python code of its own for a model type that we do not know.

    As transformers does by default, where it has the type itself. An architecture that is not the type's own is found
    when the model is built.
    """
    if "auto_map" in config and config.get("model_type") not in CLASS_BY_MODEL_TYPE.keys() | IN_OUR_TREE:
        raise UnsupportedModelError(
            f"{path / CONFIG_FILE} asks for its own code (auto_map), which is never run here; "
            "use a checkpoint of an architecture that transformers itself knows."
        )


def _optional_json(file: Path) -> dict[str, Any] | None:
    return _json(file) if file.is_file() else None


def _json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{file} is larger than {_MAX_JSON_BYTES} bytes; it cannot be a model's JSON file.")
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); check its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); download or copy it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object; download or copy it again.")
    return value


def _weight_files(path: Path, there: Collection[str]) -> tuple[Path, ...]:
    """``there``: the files that exist."""
    if (path / INDEX_FILE).is_file():
        names = sorted(set(_weight_map(path).values()))
        missing = [name for name in names if name not in there]
        if missing:
            raise CheckpointError(
                f"{path / INDEX_FILE} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
                "not there; copy the missing shards into the directory."
            )
        return tuple(path / name for name in names)
    if SINGLE_FILE in there:
        return (path / SINGLE_FILE,)
    if any(name.endswith(".safetensors") for name in there):
        raise CheckpointError(f"{path} has safetensors shards but no {INDEX_FILE}; copy the index as well.")
    if any(path.glob("*.bin")) or any(path.glob("*.pth")) or any(path.glob("*.pt")):
        raise CheckpointError(
            f"{path} has only pickled weights, which are never loaded here; convert them to safetensors "
            "(transformers: model.save_pretrained)."
        )
    raise CheckpointError(f"{path} has no weights; it needs {SINGLE_FILE}, or {INDEX_FILE} and its shards.")


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = _json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX_FILE} has no weight_map; download or copy it again.")
    for tensor, name in weight_map.items():
        # A shard lies beside its index: nothing outside the directory is ever opened.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path / INDEX_FILE} places {tensor} in {name!r}, which is no safetensors file there."
            )
    return weight_map


def _tensors_by_name(path: Path, headers: tuple[FileHeader, ...]) -> dict[str, TensorHeader]:
    by_file = {header.file.name: {tensor.name: tensor for tensor in header.tensors} for header in headers}
    if not (path / INDEX_FILE).is_file():
        return by_file[SINGLE_FILE]
    weight_map = _weight_map(path)
    for name, file in weight_map.items():
        if name not in by_file[file]:
            elsewhere = [other for other, tensors in by_file.items() if name in tensors]
            found = f"it is in {elsewhere[0]}" if elsewhere else "no shard has it"
            raise CheckpointError(
                f"{path / INDEX_FILE} places {name} in {file}, but that file lacks it ({found}); "
                "copy index and shards of one and the same checkpoint."
            )
    return {name: by_file[file][name] for name, file in weight_map.items()}


def _with_digests(
    path: Path, headers: tuple[FileHeader, ...], tensors: dict[str, TensorHeader]
) -> dict[str, TensorHeader]:
    digests = read_manifest(path)
    if digests is None:
        return tensors
    require_sizes(path, digests, {header.file.name: header.size for header in headers})
    return {name: replace(tensor, digests=digests[tensor.file.name]) for name, tensor in tensors.items()}


def digest_of(path: Path, tokenizer_files: tuple[Path, ...], headers: tuple[FileHeader, ...], extra: str = "") -> str:
    """The digest that ``Checkpoint`` describes. ``extra``: what else tells this checkpoint from others."""
    digest = hashlib.sha256()
    for file in (path / CONFIG_FILE, path / GENERATION_CONFIG_FILE, *tokenizer_files):
        if file.is_file():
            content = file.read_bytes()
            digest.update(f"{file.name}\0{len(content)}\0".encode())
            digest.update(content)
    for header in headers:
        digest.update(f"{header.file.name}\0{header.size}\0{len(header.raw)}\0".encode())
        digest.update(header.raw)
    digest.update(extra.encode())
    return digest.hexdigest()
