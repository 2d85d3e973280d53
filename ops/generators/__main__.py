"""``python -m ops.generators [--check]``: writes every generated file, or names those that are out of date."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

import ops.generators

ROOT = Path(__file__).resolve().parents[2]


def generated() -> dict[str, str]:
    """Every generated file's text by its path below the repository's root."""
    texts: dict[str, str] = {}
    for found in sorted(module.name for module in pkgutil.iter_modules(ops.generators.__path__)):
        module = importlib.import_module(f"ops.generators.{found}") if found != "__main__" else None
        for path, text in getattr(module, "files", dict)().items():
            assert path not in texts, f"{path} is generated twice"
            texts[path] = text
    return texts


def outdated(texts: dict[str, str]) -> list[str]:
    """The paths whose file is missing or differs."""
    return [path for path, text in texts.items() if not (ROOT / path).is_file() or (ROOT / path).read_text() != text]


def main() -> None:
    parser = argparse.ArgumentParser(prog="ops/generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is out of date")
    check = parser.parse_args().check
    texts = generated()
    stale = outdated(texts)
    for path in stale:
        print(f"{'out of date' if check else 'written'}: {path}")
        if not check:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(texts[path])
    if check and stale:
        sys.exit("Run ops/generate and commit what it wrote.")


if __name__ == "__main__":
    main()
