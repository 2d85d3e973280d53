"""The house style as tests: what a reviewer would otherwise say by hand, every time."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for path in (ROOT / "cluster").rglob("*.py") if "_pb2" not in path.name)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
FUNCTION_LINES = 70
MODULE_LINES = 500
# They say nothing about what is inside.
EMPTY_NAMES = {"manager", "helper", "helpers", "utils", "util", "handler", "data", "info", "common", "base", "misc"}
PROMISES = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
# A path of somebody's machine has no place in a project; tests may invent some.
MACHINE_PATHS = re.compile(r"(?<![\w.~$}])/(?:home|root|Users|work|mnt)/\w")
# Their names promise that they fail when something is not so.
CHECKER = re.compile(r"raises$|warns$|(check|assert|until|wait)(_|$)")
# Entered by name, not by import: the program's doors.
DOORS = {"cluster.__main__", "cluster.cli.main", "cluster"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def show(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_by(path: Path) -> Iterator[str]:
    """Every module that ``path`` imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def broad(handler: ast.ExceptHandler) -> bool:
    """Catches everything and keeps it. One that cleans up and passes the error on hides nothing."""
    last = handler.body[-1]
    if isinstance(last, ast.Raise) and last.exc is None:
        return False
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or ast.unparse(kind) in {"Exception", "BaseException"} for kind in kinds)


@pytest.mark.parametrize("path", SOURCES, ids=show)
class TestEveryModule:
    def test_fits_in_the_head(self, path: Path) -> None:
        assert len(path.read_text().splitlines()) <= MODULE_LINES

    def test_its_functions_fit_on_a_screen(self, path: Path) -> None:
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)]
        sizes = {function.name: function.end_lineno - function.lineno + 1 for function in functions}
        assert {name: size for name, size in sizes.items() if size > FUNCTION_LINES} == {}

    def test_says_what_it_is_for(self, path: Path) -> None:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree)
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        assert [node.name for node in classes if not ast.get_docstring(node)] == []

    def test_broad_excepts_say_why(self, path: Path) -> None:
        lines = path.read_text().splitlines()
        handlers = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.ExceptHandler)]
        silent = [node.lineno for node in handlers if broad(node) and "# boundary:" not in lines[node.lineno - 1]]
        assert silent == []

    def test_names_say_something(self, path: Path) -> None:
        named = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function | ast.ClassDef)]
        assert path.stem not in EMPTY_NAMES
        assert {node.name.lower() for node in named} & EMPTY_NAMES == set()

    def test_promises_nothing(self, path: Path) -> None:
        assert PROMISES.findall(path.read_text()) == []

    def test_knows_no_machine(self, path: Path) -> None:
        assert MACHINE_PATHS.findall(path.read_text()) == []


def test_no_module_is_dead() -> None:
    """Each is imported by another part of the product (a package counts as used with any of its modules)."""
    used = {name for path in SOURCES for name in imported_by(path) if name != name_of(path)}
    texts = {path: path.read_text() for path in SOURCES}
    named = {
        name_of(path)
        for path in SOURCES
        if any(f'"{name_of(path)}' in text for other, text in texts.items() if other != path)
    }
    packages = {name.rsplit(".", depth)[0] for name in used | named for depth in range(1, 4)}
    dead = {name_of(path) for path in SOURCES} - used - named - packages - DOORS
    assert dead == set()


def test_the_rule_finds_a_dead_module(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("import cluster.x\nfrom cluster.y import z\ndef f():\n    from cluster import w\n")
    assert set(imported_by(file)) == {"cluster.x", "cluster.y", "cluster.y.z", "cluster", "cluster.w"}


def functions_of(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def called_in(function: Function) -> set[str]:
    """The last part of every name that is called."""
    functions = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in functions}


def can_fail(function: Function, checkers: set[str]) -> bool:
    """It asserts, expects an error, or calls what does; a call that merely returns proves nothing."""
    if any(isinstance(node, ast.Assert) for node in ast.walk(function)):
        return True
    return any(name in checkers or CHECKER.match(name) for name in called_in(function))


def checkers_in(trees: list[ast.AST]) -> set[str]:
    """Functions of the tests that assert, themselves or through others."""
    functions = [function for tree in trees for function in functions_of(tree) if not function.name.startswith("test_")]
    checkers: set[str] = set()
    while True:
        found = {function.name for function in functions if can_fail(function, checkers)}
        if found <= checkers:
            return checkers
        checkers |= found


def test_every_test_can_fail() -> None:
    trees = {path: ast.parse(path.read_text()) for path in TESTS}
    checkers = checkers_in(list(trees.values()))
    mute = [
        f"{show(path)}::{function.name}"
        for path, tree in trees.items()
        for function in functions_of(tree)
        if function.name.startswith("test_") and not can_fail(function, checkers)
    ]
    assert mute == []


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("run()", False),
        ("with open(x): run()", False),
        ("assert run()", True),
        ("with pytest.raises(ValueError): run()", True),
        ("bench.until(ready)", True),
        ("judge(run())", True),
        ("indirectly(run())", True),
    ],
)
def test_the_rule_finds_a_test_that_cannot_fail(body: str, verdict: bool) -> None:
    tree = ast.parse(f"def judge(x):\n    assert x\ndef indirectly(x):\n    judge(x)\ndef test_it():\n    {body}\n")
    (test,) = [function for function in functions_of(tree) if function.name == "test_it"]
    assert can_fail(test, checkers_in([tree])) is verdict


@pytest.mark.parametrize("path", PAGES, ids=show)
class TestEveryPage:
    def test_names_only_what_exists(self, path: Path) -> None:
        """Files that a page names in backticks are there."""
        named = re.findall(r"`((?:cluster|ops|tests|docs|protos)/[\w./-]+)`", path.read_text())
        assert [name for name in named if not (ROOT / name).exists()] == []

    def test_its_links_lead_somewhere(self, path: Path) -> None:
        links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", path.read_text())
        assert [link for link in links if not (path.parent / link).exists()] == []

    def test_promises_nothing(self, path: Path) -> None:
        assert PROMISES.findall(path.read_text()) == []

    def test_knows_no_machine(self, path: Path) -> None:
        assert MACHINE_PATHS.findall(path.read_text()) == []
