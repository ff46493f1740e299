"""The design of the project as tests: imports between rooms, imports at start-up, sizes, the command for all tests."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import arcmerge
import tiny
from arcmerge import _C

HOUSE = Path(__file__).resolve().parent.parent
PACKAGE = HOUSE / "python" / "arcmerge"
README = HOUSE / "README.md"
HEAVY = {"torch", "triton", "transformers"}

# Every module may import these.
SHARED = {"dtypes", "errors", "geometry", "interrupts", "threads"}
# The rooms and modules that each room of the package may import, in addition to itself and the shared modules.
MAY_IMPORT = {
    "kernels": set(),
    "dispatch": {"cuda", "_C"},
    "checkpoint": {"_C"},
    "ops": {"dispatch", "cuda", "kernels", "_C"},
    "cuda": {"kernels"},
    "merging": {"checkpoint", "ops", "kernels", "_C"},
    "gemma2": {"checkpoint", "ops", "dispatch", "merging", "_C"},
    "sweeping": {"checkpoint", "gemma2", "merging", "_C"},
    "integrations": {"gemma2", "merging", "ops", "dispatch"},
    "cli": {"checkpoint", "merging", "gemma2", "sweeping", "doctor", "_C"},
    # Top-level modules. The package itself names the homes of its public names.
    "__init__": {"gemma2", "merging", "sweeping", "tensors"},
    "__main__": {"cli"},
    "doctor": {"dispatch", "ops", "_C"},
    "tensors": {"merging", "ops", "dispatch", "tensors_on_gpu", "_C"},
    "tensors_on_gpu": {"merging", "kernels", "dispatch"},
    "dtypes": set(),
    "errors": set(),
    "geometry": set(),
    "interrupts": set(),
    "threads": {"_C"},
}
# The largest number of lines: of a file, and of all files in a part of the product.
MAX_FILE_LINES = 400
MAX_LINES = {
    "csrc": 7_450,
    "kernels": 3_900,
    "python/arcmerge/checkpoint": 1_400,
    "python/arcmerge/cli": 900,
    "python/arcmerge/cuda": 300,
    "python/arcmerge/dispatch": 700,
    "python/arcmerge/gemma2": 3_600,
    "python/arcmerge/integrations": 1_650,
    "python/arcmerge/merging": 9_900,
    "python/arcmerge/ops": 2_900,
    "python/arcmerge/sweeping": 2_200,
}
# The largest number of files in a folder, `__init__.py` aside. A plain list of one kind may have any number.
MAX_FOLDER_FILES = 12
LISTS = {"kernels", "python/arcmerge/ops", "python/arcmerge/merging/methods"}
START_SECONDS = 0.3


def sources(*rooms: str) -> list[Path]:
    """Python, C++ and CUDA files, those of kernels/ once although two paths lead to them."""
    files = [path for room in rooms for path in (HOUSE / room).rglob("*")]
    link = PACKAGE / "kernels"
    return sorted(
        path for path in files if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"} and link not in path.parents
    )


def imports(path: Path) -> set[str]:
    """Every module that a file of the package imports, at its top or inside a function."""
    package = ".".join(["arcmerge", *path.relative_to(PACKAGE).parts[:-1]])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # `from arcmerge import _C` names a module, `from arcmerge.merging.plan.plan import Plan` comes from one.
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "arcmerge" else {module}
    return found


def within(module: str, *parents: str) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def run_python(code: str, *arguments: str, folder: Path = HOUSE) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


# ---- who imports whom


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_the_table_allows(room):
    files = sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    allowed = {f"arcmerge.{name}" for name in (room, *MAY_IMPORT[room], *SHARED, "__version__")}
    assert not [
        f"{file.name} imports {module}"
        for file in files
        for module in sorted(imports(file))
        if within(module, "arcmerge") and module != "arcmerge" and not within(module, *allowed)
    ]


def test_the_table_has_every_room_and_module():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found | {"kernels"} == set(MAY_IMPORT)


def test_checkpoints_know_no_torch():
    files = sorted((PACKAGE / "checkpoint").glob("*.py"))
    assert not [file.name for file in files if any(within(module, *HEAVY) for module in imports(file))]


def test_kernels_import_torch_and_triton_alone():
    modules = {module for file in (PACKAGE / "kernels").glob("*.py") for module in imports(file)}
    ours = {module for module in modules if within(module, "torch", "triton", "arcmerge.kernels")}
    assert "triton.language" in ours
    assert {module.split(".")[0] for module in modules - ours} <= sys.stdlib_module_names


def test_native_code_knows_neither_python_nor_torch():
    for path in sources("csrc"):
        included = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text())
        # Kernels in CUDA C++ have a folder of their own, and may include the headers of the toolkit.
        toolkit = "" if path.parent.name == "cuda" else "|cuda"
        foreign = [name for name in included if re.match(rf"pybind11|Python\.h|torch|ATen|c10{toolkit}", name)]
        assert not foreign or path.name.startswith("bind"), f"{path.name} includes {foreign}"


def test_kernels_is_one_folder_with_two_paths_and_no_package():
    assert os.readlink(PACKAGE / "kernels") == "../../kernels"
    # With an __init__.py it would shadow the `kernels` package that transformers imports.
    assert not (HOUSE / "kernels" / "__init__.py").exists()


# ---- what a start loads


def test_the_command_blocks_interrupts_before_it_loads_anything():
    before = set(run_python("import __future__, signal, sys; print(*sys.modules)").split())
    ours = set(run_python("import arcmerge.__main__, sys; print(*sys.modules)").split())
    assert ours - before == {"arcmerge", "arcmerge.__main__"}


@pytest.mark.parametrize("module", ["arcmerge", "arcmerge.cli", "arcmerge.merging.merge"])
def test_importing_loads_nothing_heavy(module):
    loaded = run_python(f"import sys, {module}; print(*sys.modules)").split()
    assert module in loaded
    assert not HEAVY & set(loaded)


def test_a_merge_on_the_cpu_loads_nothing_heavy(tmp_path):
    for name in ("gemma-a", "gemma-b"):
        tiny.make(name, tmp_path)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"models: [{{model: {tmp_path}/gemma-a}}, {{model: {tmp_path}/gemma-b}}]\n"
        f"merge_method: slerp\nbase_model: {tmp_path}/gemma-a\nparameters: {{t: 0.5}}\n"
    )
    code = "import sys; from arcmerge.cli import main; code = main(sys.argv[1:]); print(code, *sys.modules)"
    code, *loaded = run_python(code, "merge", str(recipe), str(tmp_path / "out"), "--device", "cpu", "-q").split()
    assert code == "0"
    assert "numpy" in loaded
    assert not HEAVY & set(loaded)


@pytest.mark.alone
def test_the_command_starts_in_less_than_three_tenths_of_a_second():
    def start(code: str) -> float:
        started = time.perf_counter()
        run_python(code)
        return time.perf_counter() - started

    ours, numpy = (
        min(start(code) for _ in range(7)) for code in ("import arcmerge.cli, arcmerge.merging.merge", "import numpy")
    )
    # A machine that is slow at the moment takes longer for numpy too; torch alone would be ten times that.
    assert ours < max(START_SECONDS, 4 * numpy)


# ---- one place for each fact


def test_the_stub_names_what_the_extension_has():
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    named = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    named |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert named == {name for name in dir(_C) if not name.startswith("_")}


def test_the_version_is_the_same_in_code_and_distribution():
    assert f'version = "{arcmerge.__version__}"' in (HOUSE / "pyproject.toml").read_text()


def test_continuous_integration_runs_the_test_command_of_the_readme():
    (command,) = re.findall(r"^(make \w+) +# all tests$", README.read_text(), re.MULTILINE)
    assert (HOUSE / ".ci" / "run").read_text().splitlines()[-3:] == ["make lint", command, "make test-oldest-triton"]


def test_the_makefile_names_tests_that_exist():
    targets = ["torture", "torture-interrupts", "test-oldest-triton", "architectures", "fuzz", "sanitize"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    commands = subprocess.run(
        ["make", "--dry-run", *targets], cwd=HOUSE, env=environment, check=True, capture_output=True, text=True
    ).stdout
    named = set(re.findall(r"tests/\S+\.(?:py|cpp)\b", commands))
    assert len(named) > 15
    assert not [name for name in named if not any(HOUSE.glob(name))]


def test_the_tests_see_no_gpu_unless_they_are_told_to():
    if os.environ.get("ARCMERGE_GPU") != "1":
        assert os.environ["CUDA_VISIBLE_DEVICES"] == os.environ["HIP_VISIBLE_DEVICES"] == ""
        assert os.environ["TRITON_INTERPRET"] == "1"


# ---- the shape of files


def test_only_the_command_line_prints():
    printing = [
        path.name
        for path in sources("python", "kernels")
        if PACKAGE / "cli" not in path.parents
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def lines(*paths: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_no_file_is_too_long():
    files = sources("python", "kernels", "csrc", "tests", "benchmarks", "examples", "docs")
    lengths = {str(path.relative_to(HOUSE)): lines(path) for path in files}
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}


@pytest.mark.parametrize("part", MAX_LINES)
def test_no_part_of_the_product_grows_unnoticed(part):
    assert lines(*sources(part)) <= MAX_LINES[part]


def test_every_folder_can_be_taken_in_at_a_glance():
    folders = Counter(path.parent for path in sources("python", "kernels", "csrc") if path.name != "__init__.py")
    names = {str(folder.relative_to(HOUSE)): count for folder, count in folders.items()}
    assert not {name: count for name, count in names.items() if count > MAX_FOLDER_FILES and name not in LISTS}
