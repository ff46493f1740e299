"""The command: its output, its errors and its exit codes. test_bad_input.py tests broken input."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from arcmerge.cli import main
from arcmerge.merging.plan.tensor_names import place

RECIPE = """\
merge_method: slerp
base_model: {b}
models: [{{model: {a}}}, {{model: {b}}}]
parameters:
  t:
    - {{filter: self_attn, value: [0, 0.5, 1]}}
    - {{value: 0.4}}
dtype: bfloat16
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    a, b = tiny.make("gemma-a", tmp_path), tiny.make("gemma-b", tmp_path)
    (tmp_path / "recipe.yml").write_text(RECIPE.format(a=a, b=b))
    return tmp_path


def test_merge_ends_with_one_line(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(workplace / "recipe.yml"), str(workplace / "out")]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(
        r"\S+/out: 0\.14 MB in \d+\.\d s \(\d+\.\d\d GB/s\), slerp: \d+ tensors merged \(\d+ of them on the linear "
        r"branch\), \d+ copied\n",
        printed.out,
    )
    assert printed.err == ""


def test_quiet_is_quiet(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(workplace / "recipe.yml"), str(workplace / "out"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_progress(workplace: Path) -> None:
    """Standard error is a terminal; the bar is drawn there, and cleared, while the closing line goes to the file."""
    terminal, end = pty.openpty()
    call = [sys.executable, "-m", "arcmerge", "merge", str(workplace / "recipe.yml"), str(workplace / "out")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=end, text=True, env=environment)
    out, _ = done.communicate()
    os.close(end)
    shown = os.read(terminal, 65536).decode()
    assert done.returncode == 0
    assert "merging" in shown
    assert "slerp" in out


def test_plan_tells_every_tensor(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(workplace / "recipe.yml"), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    attention = [rows[f"model.layers.{layer}.self_attn.o_proj.weight"] for layer in range(6)]
    assert [row["parameters"]["t"] for row in attention] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert [row["branch"] for row in attention] == ["copy", "linear", "slerp", "slerp", "slerp", "copy"]
    assert rows["model.norm.weight"]["parameters"]["t"] == 0.4
    near = rows["model.layers.1.mlp.up_proj.weight"]
    assert near["cosine"] > 0.9995
    assert near["coefficients"] == pytest.approx([0.4, 0.6])  # the inputs are listed a, b; b is the base


def test_plan_of_broken_weights_is_json_all_the_same(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    weights = tiny.weights(3)
    weights[name][0, 0] = float("nan")
    tiny.write_checkpoint(workplace / "broken", tiny.Model(lambda: weights))
    text = RECIPE.format(a=workplace / "broken", b=workplace / "gemma-b")
    (workplace / "recipe.yml").write_text(text)
    assert main(["plan", str(workplace / "recipe.yml"), "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out, parse_constant=refuse)}
    assert rows[name]["coefficients"] is None
    assert rows["model.norm.weight"]["coefficients"] is not None


def test_plan_is_a_table_otherwise(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(workplace / "recipe.yml")]) == 0
    printed = capsys.readouterr().out
    assert "t=0.2 linear" in printed
    assert "embed_tokens" in printed


def test_inspect_measures_angles(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(workplace / "gemma-a"), str(workplace / "gemma-b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tensors = found["tensors"]
    assert tensors["model.layers.4.self_attn.k_proj.weight"]["angle_degrees"] == pytest.approx(180, abs=1e-4)
    assert tensors["model.layers.4.self_attn.v_proj.weight"]["angle_degrees"] == pytest.approx(0, abs=1e-4)
    # b is three times as long in layer 5 as what a's distribution gives, up to the spread of some hundred values.
    assert tensors["model.layers.5.mlp.up_proj.weight"]["norm_ratio"] == pytest.approx(3, rel=0.1)
    assert tensors["model.layers.3.post_feedforward_layernorm.weight"]["angle_degrees"] is None
    layers = {(row["layer"], row["module"]): row for row in found["layers"]}
    assert layers[1, "mlp"]["near_collinear_share"] == 1
    assert layers[0, "mlp"]["near_collinear_share"] == 0
    assert 0 < found["model"]["near_collinear_share"] < 1


def test_inspect_is_a_table_otherwise(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(workplace / "gemma-a"), str(workplace / "gemma-b")]) == 0
    printed = capsys.readouterr().out
    assert "180" not in printed.splitlines()[0]
    assert "100%" in printed
    assert "…" not in printed


@pytest.mark.parametrize("call", [["plan", "recipe.yml"], ["inspect", "gemma-a", "gemma-b"]], ids=["curve", "angles"])
def test_plots_are_pictures(
    workplace: Path, call: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib import image

    monkeypatch.chdir(workplace)
    assert main([*call, "--plot", "drawn.png"]) == 0
    assert "drew drawn.png" in capsys.readouterr().err
    pixels = image.imread(workplace / "drawn.png")
    assert pixels.shape[0] > 400
    assert pixels.std() > 0.05


def test_doctor_tells_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu"]["variant"] in found["cpu"]["variants"]
    assert found["ops"]["on cpu"]["gram"].startswith("native")
    assert main(["doctor"]) == 0
    assert found["packages"]["torch"] in capsys.readouterr().out


def test_every_flag_of_mergekit_is_taken(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    click = pytest.importorskip("click")
    theirs = pytest.importorskip("mergekit.scripts.run_yaml").main
    values = {"--device": "cpu", "--out-shard-size": "1B", "--transformers-cache": str(workplace), "--random-seed": "1"}
    flags: list[str] = []
    for parameter in theirs.params:
        if not isinstance(parameter, click.Option) or "--help" in parameter.opts:
            continue
        name = max(parameter.opts, key=len)
        if name in ("--cuda", "--gpu-rich", "--safe-serialization"):
            flags.append(f"--no-{name[2:]}" if name != "--safe-serialization" else name)
        elif parameter.is_flag or parameter.count:
            flags.append(name)
        else:
            flags += [name, values.get(name, "1")]
    assert len(flags) > 20
    assert main(["merge", str(workplace / "recipe.yml"), str(workplace / "out"), *flags]) == 0
    assert "--lazy-unpickle has no effect" in capsys.readouterr().err


def test_a_terminated_run_clears_up(workplace: Path) -> None:
    script = (
        "import sys, time\n"
        "from arcmerge.merging.execution import to_disk\n"
        "to_disk.DiskMerge._forget = lambda self, piece: time.sleep(0.03)\n"
        "from arcmerge.__main__ import run\n"
        "run()\n"
    )
    call = [sys.executable, "-c", script, "merge", str(workplace / "recipe.yml"), str(workplace / "out")]
    child = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
    while not list(workplace.glob(".out.partial-*/*.safetensors")):
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 143
    assert errors == "arcmerge: ended by SIGTERM; an older output is as it was\n"
    assert not list(workplace.glob("*out*"))


def test_a_fault_of_ours_is_one_sentence(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise KeyError("two\nlines \x1b[31m")

    monkeypatch.setattr("arcmerge.merging.merge.merge", faulty)
    assert main(["merge", str(workplace / "recipe.yml"), str(workplace / "out")]) == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("arcmerge: unexpected KeyError: ")
    assert complaint.count("\n") == 1
    assert "\x1b" not in complaint
    with pytest.raises(KeyError):
        main(["merge", str(workplace / "recipe.yml"), str(workplace / "out"), "--debug"])


def test_debug_shows_the_traceback(workplace: Path) -> None:
    with pytest.raises(Exception, match="must be a file that can be read"):
        main(["merge", str(workplace / "absent.yml"), str(workplace / "out"), "--debug"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.self_attn.q_proj.weight", (12, "self_attn.q_proj", "self_attn")),
        ("model.layers.3.post_attention_layernorm.weight", (3, "post_attention_layernorm", "norm")),
        ("model.layers.3.self_attn.q_norm.weight", (3, "self_attn.q_norm", "self_attn")),
        ("language_model.model.layers.0.mlp.up_proj.bias", (0, "mlp.up_proj.bias", "mlp")),
        ("model.embed_tokens.weight", (None, "embed_tokens", "embed_tokens")),
        ("model.norm.weight", (None, "norm", "norm")),
        ("lm_head.weight", (None, "lm_head", "lm_head")),
    ],
)
def test_places(name: str, expected: tuple[int | None, str, str]) -> None:
    assert place(name) == expected


@pytest.mark.parametrize("flags", [[], ["-OO"]], ids=["plain", "without docstrings"])
def test_help_shows_a_summary_and_an_example(flags: list[str]) -> None:
    def shown(*arguments: str) -> str:
        command = [sys.executable, *flags, "-m", "arcmerge", *arguments, "--help"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "score many candidates of a merge" in shown()
    assert "arcmerge merge recipe.yml merged/" in shown("merge")


def test_completion_knows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in ("merge", "sweep", "--out-shard-size"))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
