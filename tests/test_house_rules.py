"""The house rules that a linter does not know: file sizes, first lines, names."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("planner", "profiles", "runtime", "tests", "benchmarks")
CLI = tuple(sorted(path.name for path in ROOT.glob("cli*.py")))
CODE = [*map(Path, CLI), *sorted(p.relative_to(ROOT) for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))]
SHIPPED = [path for path in CODE if path.parts[0] not in ("tests", "benchmarks")]
MOST_LINES = 400
FORBIDDEN_NAMES = {"utils.py", "util.py", "helpers.py", "types.py", "profile.py", "common.py", "misc.py"}


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_a_module_is_short_and_its_first_line_says_what_it_is_for(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= MOST_LINES, f"{path} has {len(lines)} lines: split it"
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    assert docstring, f"{path} has no docstring"
    assert lines[0].startswith('"""'), f"{path}: the docstring begins on line 1"
    assert len(docstring.splitlines()[0]) > 10, f"{path}: line 1 says what the module is for"


def test_every_package_is_looked_at() -> None:
    assert sorted(path.name for path in ROOT.glob("*.py")) == sorted(CLI)
    assert {path.parts[0] for path in SHIPPED} == {"planner", "profiles", "runtime", *CLI}
    assert len(SHIPPED) > 30


def test_no_two_modules_share_a_name() -> None:
    names = Counter(path.name for path in CODE if path.name not in ("__init__.py", "conftest.py"))
    assert [name for name, number in names.items() if number > 1] == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [str(path) for path in CODE if path.name in FORBIDDEN_NAMES] == []


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.parts[0] in ("profiles", "planner")], ids=str)
def test_facts_and_decisions_do_not_print(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in {node.func.id for node in calls if isinstance(node.func, ast.Name)}
