"""docs/publish.md: every command in it is run as it stands, in its order, against a real registry."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from registry_setting import NEEDS_REGISTRY, RegistryServer
from run_folder import RunFolder

from artifacts.artifact import Artifact

PAGE = Path(__file__).parents[1] / "docs" / "publish.md"


@NEEDS_REGISTRY
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_every_command_of_the_page_works(tmp_path: Path, tiny_verified: dict[str, Artifact]) -> None:
    made = RunFolder(tmp_path / "home", model=tiny_verified["gguf"].path)
    made.write(run=tmp_path / "runs" / made.run.name)
    registry = RegistryServer(tmp_path / "registry")
    registry.start()
    text = PAGE.read_text(encoding="utf-8")
    (tmp_path / "policy.yaml").write_text(re.findall(r"```yaml policy\.yaml\n(.*?)```", text, re.DOTALL)[0])
    commands = (
        "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)) + re.findall(r"`(model_signing [^`]*)`", text)[0]
    )
    environment = {
        **os.environ,
        "PIPELINE_HOME": str(tmp_path / "home"),
        "REGISTRY": registry.host,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    try:
        done = subprocess.run(
            ["bash", "-e", "-x", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    finally:
        registry.kill()
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("v1", "6 gates passed", "max_asr hold as the policy asks", "test-result.intoto.json"):
        assert said in done.stdout
    assert "Verification succeeded" in done.stdout + done.stderr
