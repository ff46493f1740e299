"""Broken recipes, checkpoints and calls: each gives one error message and changes nothing.

The message is one line on standard error with the rule, the value and the advice; the tables have words that it must
contain. Exit code 1 is a failed merge, 2 a wrong call. No files are left behind, and an older output does not change.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

import arcmerge
import tiny
from arcmerge.cli import main
from bad_recipes import RECIPES, Bad, Recipe, models, of_gemma, recipe

MODELS = ("llama-a", "llama-b", "qwen2-a", "gemma-a", "gemma-b-vocabulary", "gemma-shallow", "gemma-wide")
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def edit_config(change: Callable[[Recipe], object], model: str = "llama-b") -> Callable[[], None]:
    def spoil() -> None:
        path = Path("models", model, "config.json")
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return spoil


def edit_header(change: Callable[[Recipe], object]) -> Callable[[], None]:
    """Change the header of llama-b's safetensors but not its data."""

    def spoil() -> None:
        blob = WEIGHTS.read_bytes()
        end = 8 + int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8:end])
        change(header)
        tiny.write_raw_safetensors(WEIGHTS, header, blob[end:])

    return spoil


def edit_tensors(change: Callable[[tiny.Weights], object], dtype: str = "BF16") -> Callable[[], None]:
    """Write llama-b with other tensors."""

    def spoil() -> None:
        tensors = tiny.MODELS["llama-b"].weights()
        change(tensors)
        tiny.write_safetensors(WEIGHTS, tensors, dtype)

    return spoil


def reshape_embedding(model: str) -> None:
    tensors = tiny.MODELS[model].weights()
    tensors[tiny.EMBEDDING] = tensors[tiny.EMBEDDING].reshape(320, 4, 8)
    tiny.write_safetensors(Path("models", model, "model.safetensors"), tensors, "BF16")


def replace_weights(content: bytes, name: str = "model.safetensors") -> Callable[[], None]:
    def spoil() -> None:
        WEIGHTS.unlink()
        (WEIGHTS.parent / name).write_bytes(content)

    return spoil


def write_index(weight_map: dict[str, str]) -> Callable[[], object]:
    def spoil() -> None:
        WEIGHTS.rename(WEIGHTS.parent / "model-00001-of-00002.safetensors")
        (WEIGHTS.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


WEIGHTS = Path("models/llama-b/model.safetensors")
SHARD = "model-00001-of-00002.safetensors"

CHECKPOINTS = {
    "no-such-folder": Bad(("./absent",), recipe(models=[*models("llama-a"), {"model": "./absent"}])),
    "hub-name-offline": Bad(("nobody/nothing",), recipe(models=[*models("llama-a"), {"model": "nobody/nothing"}])),
    "model-is-a-file": Bad(("notes.txt", "folder"), recipe(models=[*models("llama-a"), {"model": "notes.txt"}])),
    "no-config": Bad(("llama-b", "config.json"), spoil=lambda: Path("models/llama-b/config.json").unlink()),
    "config-no-json": Bad(("config.json", "JSON"), spoil=lambda: Path("models/llama-b/config.json").write_text("{")),
    "config-claims-more-layers": Bad(
        ("llama-a", "num_hidden_layers", "4", "3"),
        spoil=lambda: [edit_config(lambda config: config.update(num_hidden_layers=4), f"llama-{x}")() for x in "ab"],
    ),
    "config-depth-in-words": Bad(
        ("config.json", "num_hidden_layers", "'3'"),
        spoil=edit_config(lambda config: config.update(num_hidden_layers="3")),
    ),
    "config-architecture-no-list": Bad(
        ("config.json", "architectures", "list"),
        spoil=edit_config(lambda config: config.update(architectures="LlamaForCausalLM")),
    ),
    "config-decoder-no-object": Bad(
        ("config.json", "text_config", "None"), spoil=edit_config(lambda config: config.update(text_config=None))
    ),
    "config-nested-vocabulary-in-words": Bad(
        ("config.json", "text_config.vocab_size", "'320'"),
        spoil=edit_config(lambda config: config.update(text_config={"vocab_size": "320"})),
    ),
    "half-a-character": Bad(
        ("config.json", "unpaired surrogate", r"\ud800"), spoil=edit_config(lambda config: config.update(x="\ud800"))
    ),
    "generation-config-no-object": Bad(
        ("generation_config.json", "object", "[]"),
        recipe(tokenizer_source="base"),
        lambda: Path("models/llama-a/generation_config.json").write_text("[]"),
    ),
    "header-of-too-many-dimensions": Bad(
        (WEIGHT, "64"), spoil=edit_header(lambda header: header[WEIGHT].update(shape=[1] * 100 + [64, 32]))
    ),
    "embedding-of-three-dimensions": Bad(
        (tiny.EMBEDDING, "[320, 4, 8]", "tokenizer"),
        recipe(tokenizer_source="base"),
        lambda: [reshape_embedding(f"llama-{letter}") for letter in "ab"],
    ),
    "quantized": Bad(
        ("llama-b", "quantized", "must have weights in bf16, f16 or f32"),
        spoil=edit_config(lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"})),
    ),
    "no-weights": Bad(("llama-b", "safetensors"), spoil=WEIGHTS.unlink),
    "pickled-weights": Bad(("llama-b", ".bin", "pickle"), spoil=replace_weights(b"...", "pytorch_model.bin")),
    "gguf-only": Bad(("llama-b", "safetensors"), spoil=replace_weights(b"GGUF", "model.gguf")),
    "empty-file": Bad((str(WEIGHTS), "0"), spoil=replace_weights(b"")),
    "cut-off": Bad((str(WEIGHTS), "truncated"), spoil=lambda: os.truncate(WEIGHTS, WEIGHTS.stat().st_size - 100)),
    "cut-off-in-header": Bad((str(WEIGHTS), "truncated"), spoil=lambda: os.truncate(WEIGHTS, 500)),
    "bytes-behind-the-end": Bad((str(WEIGHTS), "10"), spoil=lambda: os.truncate(WEIGHTS, WEIGHTS.stat().st_size + 10)),
    "not-safetensors": Bad((str(WEIGHTS), "safetensors"), spoil=replace_weights(b"\xff" * 64)),
    "header-no-json": Bad((str(WEIGHTS), "JSON"), spoil=replace_weights((8).to_bytes(8, "little") + b"{{{{{{{{")),
    "lfs-pointer": Bad(
        (str(WEIGHTS), "LFS"), spoil=replace_weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    ),
    "header-dtype-unknown": Bad((WEIGHT, "F4"), spoil=edit_header(lambda header: header[WEIGHT].update(dtype="F4"))),
    "header-shape-and-bytes": Bad(
        (WEIGHT, "[64, 31]"), spoil=edit_header(lambda header: header[WEIGHT].update(shape=[64, 31]))
    ),
    "header-overlap": Bad(
        (WEIGHT, "overlaps"),
        spoil=edit_header(lambda header: header[WEIGHT].update(data_offsets=[0, 4096])),
    ),
    "index-names-absent-shard": Bad(
        ("llama-b", "model-00002-of-00002.safetensors"),
        spoil=write_index({tiny.EMBEDDING: SHARD, WEIGHT: "model-00002-of-00002.safetensors"}),
    ),
    "index-names-absent-tensor": Bad(("llama-b", "model.lost"), spoil=write_index({"model.lost": SHARD})),
    "index-leaves-the-folder": Bad(("index.json", "../"), spoil=write_index({WEIGHT: "../model.safetensors"})),
    "index-no-json": Bad(
        ("index.json", "JSON"),
        spoil=lambda: Path("models/llama-b/model.safetensors.index.json").write_text("weights"),
    ),
    "tensor-missing": Bad(("llama-b", WEIGHT), spoil=edit_tensors(lambda tensors: tensors.pop(WEIGHT))),
    "embedding-missing": Bad(("llama-b", tiny.EMBEDDING), spoil=edit_tensors(lambda t: t.pop(tiny.EMBEDDING))),
    "shapes-differ": Bad((WEIGHT, "64", "63"), spoil=edit_tensors(lambda t: t.update({WEIGHT: t[WEIGHT][:63]}))),
    "sizes-differ": Bad(("gemma-wide", "32", "48"), of_gemma("gemma-wide")),
    "vocabularies-differ": Bad(
        ("320", "336", "'tokenizer_source: union' (or base) in the recipe"), of_gemma("gemma-b-vocabulary")
    ),
    "depths-differ": Bad(
        ("'models' must", "gemma-shallow", "6", "4", "under slices"),
        of_gemma("gemma-shallow"),
    ),
    "architectures-differ": Bad(
        ("LlamaForCausalLM", "Qwen2ForCausalLM", "--allow-crimes"), recipe(models=models("llama-a", "qwen2-a"))
    ),
    "integers": Bad((WEIGHT, "int16"), spoil=edit_header(lambda header: header[WEIGHT].update(dtype="I16"))),
    "nan": Bad((WEIGHT, "--allow-nonfinite"), spoil=edit_tensors(lambda t: t[WEIGHT].fill(float("nan")))),
    "infinity": Bad((WEIGHT, "--allow-nonfinite"), spoil=edit_tensors(lambda t: t[WEIGHT].fill(float("-inf")))),
    "overflow-of-float16": Bad(
        (WEIGHT, "float16"), recipe(out_dtype="float16"), edit_tensors(lambda t: t[WEIGHT].fill(1e6))
    ),
    "no-tokenizer-to-align": Bad(
        ("llama-a", "tokenizer.json"),
        recipe(tokenizer_source="base"),
        lambda: Path("models/llama-a/tokenizer.json").unlink(),
    ),
    "tokenizer-no-json": Bad(
        ("llama-a", "tokenizer.json"),
        recipe(tokenizer_source="union"),
        lambda: Path("models/llama-a/tokenizer.json").write_text("{"),
    ),
}

CALLS = {
    "no-command": Bad(("COMMAND",), call=(), code=2),
    "command-unknown": Bad(("'mrege'", "merge"), call=("mrege", "recipe.yml", "out"), code=2),
    "flag-unknown": Bad(("--fast",), call=("merge", "recipe.yml", "out", "--fast"), code=2),
    "out-left-out": Bad(("OUT",), call=("merge", "recipe.yml"), code=2),
    "one-argument-too-many": Bad(("more",), call=("merge", "recipe.yml", "out", "more"), code=2),
    "threads-in-words": Bad(("--num-threads", "'two'"), call=("merge", "recipe.yml", "out", "-j", "two"), code=2),
    "no-threads": Bad(("--num-threads", "'0'"), call=("merge", "recipe.yml", "out", "-j", "0"), code=2),
    "too-many-threads": Bad(("--num-threads", "1024"), call=("merge", "recipe.yml", "out", "-j", "99999"), code=2),
    "threads-in-superscript": Bad(("--num-threads", "'²'"), call=("merge", "recipe.yml", "out", "-j", "²"), code=2),
    "shard-size-in-words": Bad(
        ("shard", "'much'", "5B"), call=("merge", "recipe.yml", "out", "--out-shard-size", "much"), code=2
    ),
    "plot-of-no-kind": Bad(("--plot", "'c.xyz'", ".png"), call=("plan", "recipe.yml", "--plot", "c.xyz"), code=2),
    "plot-nowhere": Bad(("--plot", "absent"), call=("plan", "recipe.yml", "--plot", "absent/c.png"), code=2),
    "inspect-one-model": Bad(("'models/llama-a' twice",), call=("inspect", "models/llama-a", "models/llama-a")),
    "device-unknown": Bad(("device", "'tpu'", "cuda"), call=("merge", "recipe.yml", "out", "--device", "tpu"), code=2),
    "device-absent": Bad(("cuda:99",), call=("merge", "recipe.yml", "out", "--device", "cuda:99")),
    "pickle-wanted": Bad(("--no-safe-serialization",), call=("merge", "recipe.yml", "out", "--no-safe-serialization")),
    "recipe-absent": Bad(("absent.yml",), call=("merge", "absent.yml", "out")),
    "recipe-is-a-folder": Bad(("models",), call=("merge", "models", "out")),
    "recipe-is-no-text": Bad((str(WEIGHTS), "UTF-8"), call=("merge", str(WEIGHTS), "out")),
    "out-is-a-file": Bad(("notes.txt",), call=("merge", "recipe.yml", "notes.txt")),
    "out-is-a-parent": Bad(("models/llama-a",), call=("merge", "recipe.yml", "models/llama-a")),
    "out-holds-parents": Bad(("models",), call=("merge", "recipe.yml", "models")),
    "out-under-a-file": Bad(("notes.txt",), call=("merge", "recipe.yml", "notes.txt/out")),
    "out-is-a-circle": Bad(
        ("circle", "folder"), spoil=lambda: Path("circle").symlink_to("circle"), call=("merge", "recipe.yml", "circle")
    ),
    "out-holds-other-things": Bad(("other", "no model"), call=("merge", "recipe.yml", "other")),
    "plan-of-nothing": Bad(("absent.yml",), call=("plan", "absent.yml")),
    "inspect-one": Bad(("B",), call=("inspect", "models/llama-a"), code=2),
    "inspect-nothing": Bad(("./absent",), call=("inspect", "models/llama-a", "./absent")),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with models, an older output, a file, and a folder without a model."""
    folder = tmp_path_factory.mktemp("pristine")
    for name in MODELS:
        tiny.make(name, folder / "models")
    shutil.copytree(folder / "models" / "llama-b", folder / "models" / "llama-c")
    older = {"merge_method": "passthrough", "models": [{"model": str(folder / "models" / "llama-b")}]}
    arcmerge.merge(older, folder / "older", device="cpu")
    (folder / "notes.txt").write_text("not a folder")
    (folder / "other").mkdir()
    (folder / "other" / "diary.txt").write_text("not to be lost")
    return folder


@pytest.fixture
def workplace(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current folder, without a network."""
    shutil.copytree(pristine, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "work"


def _write_recipe(content: Recipe | str | None) -> None:
    text = content if isinstance(content, str) else yaml.safe_dump(content or recipe())
    Path("recipe.yml").write_text(text)


def _contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below a folder with its modification time and content."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def test_a_correct_call_works(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_recipe(None)
    assert main(["merge", "recipe.yml", "out"]) == 0, capsys.readouterr().err
    assert (workplace / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("over", ["nothing", "an-older-output"])
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(bad, id=f"{table}-{name}")
        for table, cases in {"recipe": RECIPES, "checkpoint": CHECKPOINTS, "call": CALLS}.items()
        for name, bad in cases.items()
    ],
)
def test_one_message_and_no_change(bad: Bad, over: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_recipe(bad.recipe)
    if over == "an-older-output":
        Path("older").rename("out")
    bad.spoil()
    before = _contents(workplace)
    assert main(list(bad.call)) == bad.code
    output = capsys.readouterr()
    assert output.out == ""
    problems = [line for line in output.err.splitlines() if not line.startswith("arcmerge: warning: ")]
    assert 1 <= len(problems) <= 2, output.err  # two where both sources of a slice break the rule
    assert all(word in problems[0] for word in bad.words), problems[0]
    assert problems[0].startswith("arcmerge: ")
    assert "Traceback" not in output.err
    assert _contents(workplace) == before


def test_the_process_ends_as_the_function_does(workplace: Path) -> None:
    _write_recipe(recipe(merge_method="slrep"))
    for arguments, code in ((["merge", "recipe.yml", "out"], 1), (["merge", "recipe.yml"], 2)):
        ended = subprocess.run([sys.executable, "-m", "arcmerge", *arguments], capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (code, "")
        assert ended.stderr.startswith("arcmerge: ")
        assert ended.stderr.count("\n") == 1
    assert not Path("out").exists()


def test_debug_shows_where(workplace: Path) -> None:
    _write_recipe(recipe(merge_method="slrep"))
    call = [sys.executable, "-m", "arcmerge", "merge", "recipe.yml", "out", "--debug"]
    ended = subprocess.run(call, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
