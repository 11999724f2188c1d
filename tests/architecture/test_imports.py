"""A package imports only packages listed above it in the README's map, and no modules import in a circle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def listed_packages(readme: str) -> list[str]:
    """Packages of stepdr_jax in the order of the README's map."""
    block = re.search(r"^stepdr_jax/\n((?:  .*\n)+)", readme, re.MULTILINE)
    assert block, "README.md has no map of stepdr_jax/"
    lines = [line for line in block[1].splitlines() if re.match(r"  \w", line)]
    return [name for line in lines for name in re.match(r"  ((?:[\w.]+/? )+)", line)[1].replace("/", "").split()]


def imported(source: str, known: set[str]) -> Iterator[str]:
    """Modules of `known` that a module's text imports, inside functions too; a package counts as its __init__."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name:
                yield name


def modules(*folders: str) -> dict[str, str]:
    """Text of every module below `folders`, by its dotted name."""
    found = {}
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path.read_text()
    return found


def import_graph(texts: dict[str, str]) -> dict[str, set[str]]:
    return {name: set(imported(text, set(texts))) - {name} for name, text in texts.items()}


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def upward(graph: dict[str, set[str]], order: list[str]) -> list[str]:
    """Imports of a package that stands at the same place or below in `order`, its own apart."""
    place = {name: number for number, name in enumerate(order)}
    found = []
    for module, targets in graph.items():
        if not module.startswith("stepdr_jax."):
            continue
        for target in targets:
            if target.startswith("stepdr_jax.") and package_of(target) != package_of(module):
                if place[package_of(target)] >= place[package_of(module)]:
                    found.append(f"{module} imports {target}")
    return sorted(found)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, in order; empty when there are none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for target in sorted(graph[module]):
            if found := visit(target):
                return found
        path.pop()
        done.add(module)
        return []

    for module in sorted(graph):
        if found := visit(module):
            return found
    return []


@pytest.fixture(scope="module")
def graph():
    return import_graph(modules("stepdr_jax", "tools_env"))


@pytest.fixture(scope="module")
def order():
    return listed_packages((ROOT / "README.md").read_text())


def test_the_readme_lists_every_package_and_module_of_the_top_level(order):
    there = {
        path.stem for path in (ROOT / "stepdr_jax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert sorted(order) == sorted(there - {"__init__"})


def test_a_package_imports_only_packages_listed_above_it(graph, order):
    assert upward(graph, order) == []


def test_an_upward_import_is_found(graph, order):
    below, above = order[0], order[-1]
    wrong = graph | {f"stepdr_jax.{below}.new": {f"stepdr_jax.{above}.run"}}
    assert upward(wrong, order) == [f"stepdr_jax.{below}.new imports stepdr_jax.{above}.run"]


def test_no_modules_import_each_other_in_a_circle(graph):
    assert circle(graph) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_tool_host_never_imports_the_trainer(graph):
    texts = modules("tools_env")
    assert not [
        name for name, text in texts.items() if re.search(r"^\s*(import|from) (jax|flax|stepdr_jax)\b", text, re.M)
    ]
