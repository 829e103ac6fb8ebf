"""The architecture: each folder of ``lesa`` imports only folders above it in ``FOLDERS``; no circular imports."""

import ast
from pathlib import Path

import pytest

import lesa

ROOT = Path(lesa.__file__).parents[1]
FOLDERS = (
    "arguments",
    "tables",
    "files",
    "reports",
    "statistics",
    "predictor",
    "forecasters",
    "runtime",
    "adapters",
    "calibration",
    "training",
    "api",
    "evaluation",
    "demo",
    "cli",
)
MATHEMATICS = ("tables", "statistics", "predictor", "forecasters")  # these import no pipeline library
PIPELINES = ("diffusers", "cache_dit", "transformers", "accelerate")
OUTSIDE = ("lesa/__init__.py", "lesa/__main__.py")  # these import from all folders


def modules(package: str) -> dict[str, Path]:
    """The files of a package, by module name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, known: dict[str, Path], *, is_package: bool = False) -> set[str]:
    """All modules that a file imports, also inside functions; for our packages, the file that defines the name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in known else base)
    return found - {module}


def graph(package: str) -> dict[str, set[str]]:
    known = modules(package)
    return {
        name: imports(path.read_text(), name, known, is_package=path.name == "__init__.py")
        for name, path in known.items()
        if str(path.relative_to(ROOT)) not in OUTSIDE
    }


def folder(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports of folders further down the list, or of ``lesa`` itself, which only the command line may import."""
    return [
        f"{name} imports {used}"
        for name, all_used in edges.items()
        for used in sorted(all_used)
        if used.split(".")[0] == "lesa"
        and (folder(name) != "cli" if used == "lesa" else FOLDERS.index(folder(used)) > FOLDERS.index(folder(name)))
    ]


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Files with circular imports, directly or through other files."""
    reached: dict[str, set[str]] = {}

    def reach(name: str) -> set[str]:
        seen, todo = set(), [name]
        while todo:
            for used in edges.get(todo.pop(), ()):
                if used in edges and used not in seen:
                    seen.add(used)
                    todo.append(used)
        return seen

    for name in edges:
        reached[name] = reach(name)
    return [name for name in edges if name in reached[name]]


def forbidden(edges: dict[str, set[str]]) -> list[str]:
    """Imports of pipeline libraries or adapters by the mathematics or the kernels."""
    return [
        f"{name} imports {used}"
        for name, all_used in edges.items()
        for used in sorted(all_used)
        if (name.split(".")[0] == "lesa_kernels" or folder(name) in MATHEMATICS)
        and (used.split(".")[0] in PIPELINES or used.startswith("lesa.adapters"))
    ]


def test_every_folder_is_in_the_list_of_folders():
    assert {folder(name) for name in graph("lesa")} == set(FOLDERS)


@pytest.mark.parametrize("package", ["lesa", "lesa_kernels"])
def test_there_are_no_circular_imports(package):
    assert circles(graph(package)) == []


def test_every_folder_imports_only_folders_above_it():
    assert upward(graph("lesa")) == []


@pytest.mark.parametrize("package", ["lesa", "lesa_kernels"])
def test_the_mathematics_and_the_kernels_import_no_pipeline_library(package):
    assert forbidden(graph(package)) == []


def test_the_kernels_import_nothing_of_lesa():
    used = set().union(*graph("lesa_kernels").values())
    assert [name for name in used if name.split(".")[0] == "lesa"] == []


def test_an_import_in_the_wrong_direction_is_found():
    edges = graph("lesa")
    wrong = edges | {"lesa.tables.plan": edges["lesa.tables.plan"] | {"lesa.api.enable"}}
    assert upward(wrong) == ["lesa.tables.plan imports lesa.api.enable"]
    assert "lesa.tables.plan" in circles(wrong)
    assert forbidden(edges | {"lesa.tables.plan": {"diffusers"}}) == ["lesa.tables.plan imports diffusers"]


def test_imports_inside_functions_and_for_types_count():
    source = "if TYPE_CHECKING:\n    from lesa.api import enable\ndef f():\n    from ..runtime import driver\n"
    known = dict.fromkeys(["lesa.api.enable", "lesa.runtime.driver"], ROOT)
    assert imports(source, "lesa.tables.plan", known) == {"lesa.api.enable", "lesa.runtime.driver"}


@pytest.mark.parametrize("package", ["lesa", "lesa_kernels"])
def test_a_file_of_more_than_300_lines_says_why_in_its_first_lines(package):
    long = {}
    for path in modules(package).values():
        lines = path.read_text().splitlines()
        if len(lines) > 300 and "one file" not in " ".join(lines[:12]):
            long[str(path.relative_to(ROOT))] = len(lines)
    assert long == {}


@pytest.mark.parametrize("package", ["lesa", "lesa_kernels"])
def test_tests_mirror_the_packages(package):
    """Every folder of tests is a folder of the package, except those that describe models of other libraries."""
    described = {"adapters/diffusers/models"}
    ours = {path.parent.relative_to(ROOT / package).as_posix() for path in modules(package).values()}
    tested = {
        path.parent.relative_to(ROOT / "tests" / package) for path in (ROOT / "tests" / package).rglob("test_*.py")
    }
    assert {folder.as_posix() for folder in tested} - described <= ours
