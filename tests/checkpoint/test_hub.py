"""Finding a model: local folders, hub names through the hub's client, and one error for each failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from arcmerge.checkpoint.hub import locate
from arcmerge.errors import ArcmergeError


def replace_download(monkeypatch: pytest.MonkeyPatch, result: Path | Exception) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def http_error(kind: type[errors.HfHubHTTPError], message: str = "refused") -> Exception:
    """An error of the hub's client without the response that some versions require."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


@pytest.mark.parametrize("name", ["plain", "with+plus@at", "two words"])
def test_a_local_folder_is_used_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    calls = replace_download(monkeypatch, ValueError())
    assert locate(str(tmp_path / name)) == tmp_path / name
    assert locate(f"~/{name}") == tmp_path / name
    assert locate(name, "main") == Path(name)
    assert not calls


@pytest.mark.parametrize("path", ["./x", "../x", "/no/such", "a/b/c", "~/no-such-model", "a b", "owner/"])
def test_a_path_without_a_folder_is_not_searched_on_the_hub(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    calls = replace_download(monkeypatch, ValueError())
    with pytest.raises(ArcmergeError) as caught:
        locate(path)
    assert str(caught.value) == f"'model' must be an existing folder or a hub name, got '{path}'; check its spelling"
    assert not calls


@pytest.mark.parametrize("path", ["x" * 5000, "./" + "x" * 300, "~nobody-of-this-name/model"])
def test_a_path_that_cannot_be_opened_is_an_error(path: str) -> None:
    with pytest.raises(ArcmergeError, match="must be a folder that can be opened, got ") as caught:
        locate(path)
    assert len(str(caught.value)) < 250


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ArcmergeError, match="must be a folder, got the file"):
        locate(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["google/gemma-2-2b", "gpt2"])
def test_a_hub_name_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls = replace_download(monkeypatch, tmp_path)
    assert locate(name, "v1", tmp_path / "cache") == tmp_path
    (call,) = calls
    assert (call["name"], call["revision"], call["cache_dir"]) == (name, "v1", tmp_path / "cache")
    assert "*.safetensors" in call["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".py")) for pattern in call["allow_patterns"])


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            errors.HFValidationError("bad"),
            "must be a local folder or a hub name, got 'owner/name'; write",
        ),
        (http_error(errors.GatedRepoError), "got 'owner/name', which is gated; accept its terms"),
        (http_error(errors.RepositoryNotFoundError), "must be a local folder or a hub repository that you may read"),
        (
            http_error(errors.RevisionNotFoundError),
            "must be a branch, tag or commit of 'owner/name' .*, got 'v9'",
        ),
        (
            errors.LocalEntryNotFoundError("not cached"),
            "can be reached, got 'owner/name'; connect, unset HF_HUB_OFFLINE",
        ),
        (errors.OfflineModeIsEnabled("offline"), "a hub that can be reached"),
        (ConnectionResetError(), "a hub that can be reached"),
        (
            http_error(errors.HfHubHTTPError, "503 Unavailable\nrequest 7"),
            r"can be downloaded, got 'owner/name' \(503 Unavailable\)",
        ),
        (OSError(28, "No space left on device"), "can be downloaded, got .*No space left"),
        (RuntimeError(), r"can be downloaded, got 'owner/name' \(RuntimeError\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str) -> None:
    replace_download(monkeypatch, error)
    with pytest.raises(ArcmergeError, match=sentence) as caught:
        locate("owner/name", "v9")
    assert "'owner/name'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_hub_client_offline(tmp_path: Path) -> None:
    code = "import sys; from arcmerge.checkpoint.hub import locate; locate('owner/no-such-model', None, sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={"HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ArcmergeError: 'model' must be a local folder, complete in the hub's cache, or on a hub" in run.stderr


def test_a_local_folder_needs_no_hub_client(tmp_path: Path) -> None:
    code = (
        "import sys; from arcmerge.checkpoint.hub import locate; locate(sys.argv[1]); "
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False).returncode == 0
