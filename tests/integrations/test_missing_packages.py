"""Optional packages that are missing: the message names what to install."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arcmerge.errors import ArcmergeError, MissingPackage, needed

HOUSE = Path(__file__).resolve().parents[2]
# None in sys.modules makes an import fail.
HIDE = "import runpy, sys; sys.modules[sys.argv.pop(1)] = None; "


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDE + code, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("module", "package", "extra"), [("mergekit", "mergekit", "mergekit"), ("lm_eval", "lm_eval", "lm-eval")]
)
def test_an_integration_that_is_called_as_a_command_fails_with_one_line(module: str, package: str, extra: str) -> None:
    name = f"arcmerge.integrations.{module}"
    ended = run(f"runpy.run_module('{name}', run_name='__main__', alter_sys=True)", package, "recipe.yml", "out")
    sentence = (
        f"arcmerge: '{package}' must be installed for {name}, got no such package; pip install 'arcmerge[{extra}]'\n"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", sentence)


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("mergekit", "mergekit", "mergekit"),
        ("transformers", "transformers", "transformers"),
    ],
)
def test_an_integration_that_is_imported_raises(module: str, package: str, extra: str) -> None:
    name = f"arcmerge.integrations.{module}"
    code = f"\ntry:\n import {name}\nexcept ImportError as error:\n print(type(error).__name__, error)"
    ended = run(code, package)
    sentence = f"'{package}' must be installed for {name}, got no such package; pip install 'arcmerge[{extra}]'"
    assert ended.stdout == f"MissingPackage {sentence}\n"


@pytest.mark.parametrize(
    ("code", "package", "sentence"),
    [
        (
            "from arcmerge.merging.inspect.plots import load_pyplot; load_pyplot()",
            "matplotlib",
            "'matplotlib' must be installed for a plot, got no such package; pip install 'arcmerge[plot]'",
        ),
        (
            "from arcmerge.sweeping.evaluators import RayEvaluator; RayEvaluator(None)",
            "ray",
            "'ray' must be installed for --ray, got no such package; pip install 'arcmerge[ray]'",
        ),
        (
            "from arcmerge.sweeping.optimizer import Optimizer; Optimizer(None, True, None, [])",
            "optuna",
            "'optuna' must be installed for --optimize, got no such package; pip install 'arcmerge[sweep]'",
        ),
    ],
)
def test_optional_packages_of_a_sweep(code: str, package: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ArcmergeError) as caught:
        exec(code)
    assert caught.value.problems == (sentence,)


def test_an_incomplete_package_has_another_message() -> None:
    with pytest.raises(MissingPackage) as caught, needed("mergekit", by="this", extra="mergekit"):
        raise ModuleNotFoundError("No module named 'peft'", name="peft")
    assert str(caught.value) == (
        "'mergekit' must be installed for this, got an import error (No module named 'peft'); "
        "pip install --upgrade 'arcmerge[mergekit]'"
    )


def test_every_extra_in_a_message_exists() -> None:
    extras = re.findall(r"^([\w-]+) = \[", (HOUSE / "pyproject.toml").read_text(), re.MULTILINE)
    named = {
        keyword.value.value
        for path in (HOUSE / "python").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "needed"
        for keyword in node.keywords
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Constant)
    }
    assert named
    assert named <= set(extras)
