"""The command line as a user meets it."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from artifacts.artifact import Artifact
from pipeline.cli import app
from pipeline.doctor import examine
from stages.models.tiny import tiny_llava_spec
from stages.runtimes.prediction import largest_copy

COMMANDS = (
    "run",
    "plan",
    "runs",
    "report",
    "recipes",
    "families",
    "stages",
    "schema",
    "inspect",
    "verify",
    "compare",
    "chat",
    "publish",
    "pull",
    "check",
    "serve",
    "fetch",
    "gc",
    "doctor",
)

CUT = """\
recipe: 1
name: cut
source: {model: demo:tiny-llava}
device: {memory: 1GiB, context: 512}
stages:
  exit: {uses: early-exit, with: {layer: 1}}
"""


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="pipeline")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small recipe has been run: source, early exit."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "cut.yaml").write_text(CUT)
    result = cli("run", str(folder / "cut.yaml"), "--runs-dir", str(folder / "runs"), "--plain")
    assert result.exit_code == 0, result.output
    return folder


def test_help_comes_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "pipeline.cli", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert all(command in done.stdout for command in COMMANDS)
    # Processor time, so that a busy machine does not fail the test.
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.5


def test_nothing_heavy_is_imported_before_a_command_needs_it() -> None:
    heavy = "('torch', 'transformers', 'numpy', 'rich', 'yaml', 'pydantic')"
    code = f"import sys, pipeline.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "cut.yaml").write_text(CUT + "  gguf: {uses: gguf, needs: exit, with: {type: Q4_0}}\n")
    code = (
        "import sys; from pipeline.commands.load import load_graph; from pipeline.commands.plan import make_plan;"
        f"make_plan(load_graph({str(tmp_path / 'cut.yaml')!r}));"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_in_its_help(command: str) -> None:
    result = cli(command, "--help")
    assert result.exit_code == 0
    assert f"Example: pipeline {command}" in result.output


def test_the_version_is_told() -> None:
    result = cli("--version")
    assert result.exit_code == 0 and re.fullmatch(r"pipeline \d+\.\d+\S*\n", result.output)


def test_recipes_are_listed_with_their_purpose() -> None:
    result = cli("recipes")
    assert re.search(r"^quickstart +\w", result.output, re.MULTILINE)
    assert json.loads(cli("recipes", "--json").output)["smoke"]["purpose"]


def test_the_schema_of_a_recipe_describes_every_stage_and_accepts_the_shipped_recipes() -> None:
    import jsonschema
    import yaml

    from recipes import shipped

    schema = json.loads(cli("schema").output)
    uses = {
        choice["properties"]["uses"]["const"]
        for choice in schema["properties"]["stages"]["additionalProperties"]["oneOf"]
        if "uses" in choice.get("properties", {})
    }
    assert {"early-exit", "l-ppo", "gguf", "icet-verify"} <= uses and "source" not in uses
    assert "laptop-8gb" in schema["properties"]["device"]["anyOf"][0]["enum"]
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in shipped().values():
        jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), schema)
    jsonschema.validate(yaml.safe_load("include: quickstart.yaml\nstages: {stock: null}\n"), schema)
    nothing = CUT.replace("{uses: early-exit, with: {layer: 1}}", "")
    for wrong in (CUT.replace("layer", "layr"), CUT.replace("uses: early-exit", "needs: source"), nothing):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(wrong), schema)


def test_the_schema_of_a_report_is_printed() -> None:
    schema = json.loads(cli("schema", "report").output)
    assert {"run", "recipe", "status", "artifacts", "gates", "measures"} <= set(schema["properties"])
    assert cli("schema", "nonsense").exit_code == 2


def test_a_plan_shows_what_is_cached_and_what_is_not(finished: Path) -> None:
    text = cli("plan", str(finished / "cut.yaml")).output
    assert re.search(r"^exit +early-exit +source +checkpoint +cached [0-9a-f]{12}$", text, re.MULTILINE)
    changed = json.loads(cli("plan", str(finished / "cut.yaml"), "--set", "stages.exit.with.layer=2", "--json").output)
    assert [(stage["id"], stage["cached"]) for stage in changed["stages"]] == [("source", True), ("exit", False)]


def test_a_plan_says_what_the_memory_of_the_result_is_for_and_draws_it_against_the_budget(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(CUT + "  gguf: {uses: gguf, needs: exit, with: {type: Q4_K_M}}\n")
    result = cli("plan", str(tmp_path / "r.yaml"))
    assert result.exit_code == 0, result.output
    shown = result.output[result.output.index("memory   gguf: Q4_K_M, context 512\n") :]
    sizes = re.findall(r"^  (weights|KV cache|compute|image encoder|overhead|total) +\d+ [KM]iB", shown, re.MULTILINE)
    assert sizes == ["weights", "KV cache", "compute", "image encoder", "overhead", "total"]
    assert re.search(r"\[[WKCIO]+\.+\] \d+% of 1.00 GiB$", shown, re.MULTILINE), shown
    assert re.search(r"note: Q5_0 instead of Q4_K for \d+ tensors with rows of 64 or 128$", shown, re.MULTILINE), shown

    (gguf,) = [stage for stage in json.loads(cli("plan", str(tmp_path / "r.yaml"), "--json").output)["stages"][2:]]
    memory = gguf["memory"]
    parts = ("weights", "kv_cache", "compute", "vision", "overhead")
    assert memory["total"] == sum(memory[part] for part in parts) and memory["context"] == 512
    assert set(memory["by_type"]) == {"F32", "Q5_0", "Q8_0"} and sum(memory["by_type"].values()) == memory["weights"]
    assert len(memory["fallbacks"]) == 2


def test_a_plan_says_what_weights_may_come_to_whose_types_are_chosen_while_running(tmp_path: Path) -> None:
    def planned(gguf: str, memory: str = "1GiB") -> dict[str, Any]:
        recipe = CUT.replace("1GiB", memory) + f"  gguf: {{uses: gguf, needs: exit, with: {gguf}}}\n"
        (tmp_path / "r.yaml").write_text(recipe)
        found: dict[str, Any] = json.loads(cli("plan", str(tmp_path / "r.yaml"), "--json").output)["stages"][-1]
        return found

    floats, auto = planned("{type: F16}")["memory"], planned("{type: auto}")
    parts = ("weights", "kv_cache", "compute", "vision", "overhead")
    assert auto["memory"]["type"] == "auto" and auto["memory"]["weights"] == floats["weights"]  # there is room for all
    assert auto["memory"]["total"] == sum(auto["memory"][part] for part in parts)
    assert "at most: types are chosen while running, and the smallest come to" in auto["memory_note"]
    target = (floats["weights"] // 2) // 1000
    most = 1000 * target + largest_copy(tiny_llava_spec().text)
    assert planned(f"{{type: auto, target: {target}kB}}")["memory"]["weights"] == most
    assert re.search(r"^memory   gguf: auto, context 512$", cli("plan", str(tmp_path / "r.yaml")).output, re.MULTILINE)


def test_a_plan_knows_the_memory_of_a_gguf_that_is_there(tiny_verified: dict[str, Artifact], tmp_path: Path) -> None:
    model = tiny_verified["gguf"].file("model.gguf")
    recipe = {
        "recipe": 1, "name": "there", "source": {"model": str(model)}, "device": {"memory": "1GiB", "context": 512},
        "stages": {"icet": {"uses": "icet-verify", "needs": "source", "with": {"baseline": None}}},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    memory = json.loads(cli("plan", str(tmp_path / "r.yaml"), "--json").output)["stages"][0]["memory"]
    assert memory["weights"] == sum(memory["by_type"].values()) and memory["vision"] > 0 and memory["context"] == 512
    assert "% of 1.00 GiB" in cli("plan", str(tmp_path / "r.yaml")).output


def test_a_plan_says_what_is_not_predicted_of_a_gptq_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(CUT + "  gptq: {uses: gptq, needs: exit, with: {group_size: 64}}\n")
    text = cli("plan", str(tmp_path / "r.yaml")).output
    assert re.search(r"^memory   gptq: gptq-4bit-64\n  weights +\d+ KiB\n  note: weights only", text, re.MULTILINE), (
        text
    )


def test_a_gptq_stage_without_its_libraries_is_planned_with_a_note_and_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.yaml").write_text(CUT + "  gptq: {uses: gptq, needs: exit, with: {group_size: 64}}\n")
    missing: list[str] = []
    monkeypatch.setattr("stages.quantize.gptq_model.missing_distributions", lambda: missing)
    plan = ("plan", str(tmp_path / "r.yaml"))
    assert "missing" not in cli(*plan).output
    missing.append("optimum")
    assert re.search(r"^missing  gptq: the gptq stage needs optimum; pip install", cli(*plan).output, re.MULTILINE)
    told = {stage["id"]: stage["missing"] for stage in json.loads(cli(*plan, "--json").output)["stages"]}
    assert told["exit"] == "" and "needs optimum" in told["gptq"]
    result = cli("run", str(tmp_path / "r.yaml"), "--runs-dir", str(tmp_path / "runs"), "--json")
    events = [json.loads(line) for line in result.output.splitlines() if line.startswith('{"event"')]
    assert result.exit_code == 1 and not any(event["event"] == "stage_started" for event in events), result.output
    assert "needs optimum" in result.output


def test_a_budget_that_nothing_fits_is_refused_by_plan_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        CUT.replace("1GiB", "20MiB") + "  gguf: {uses: gguf, needs: exit, with: {type: Q4_0}}\n"
    )
    result = cli("plan", str(tmp_path / "r.yaml"))
    assert result.exit_code == 2
    assert "does not fit" in result.stderr and "the least that these changes reach" in result.stderr


def test_runs_are_listed_and_their_report_is_found(finished: Path) -> None:
    runs = ("--runs-dir", str(finished / "runs"))
    (run,) = json.loads(cli("runs", *runs, "--json").output)
    assert run["recipe"] == "cut" and run["status"] == "passed"
    assert run["id"] in cli("runs", *runs).output
    page = Path(cli("report", *runs).output.strip())
    assert page.is_file() and page.name == "report.html"
    assert json.loads(cli("report", run["id"][:12], *runs, "--rebuild", "--json").output)["recipe"] == "cut"


def test_no_runs_is_no_error_but_a_run_that_is_not_there_is(tmp_path: Path) -> None:
    assert cli("runs", "--runs-dir", str(tmp_path)).exit_code == 0
    result = cli("report", "nothing", "--runs-dir", str(tmp_path))
    assert result.exit_code == 2 and "there are no runs" in result.stderr


def test_an_artifact_is_shown_with_its_lineage_by_stage_digest_or_folder(finished: Path) -> None:
    runs = ("--runs-dir", str(finished / "runs"))
    by_stage = json.loads(cli("inspect", "exit", *runs, "--json").output)
    assert by_stage["damage"] == []
    assert [(step["depth"], step["name"], step["stage"]) for step in by_stage["lineage"]] == [
        (0, "", "early-exit"),
        (1, "source", "source"),
    ]
    digest = by_stage["digest"]
    for name in (digest[:10], by_stage["path"], f"cut:{'exit'}"):
        result = cli("inspect", name, *runs)
        assert result.exit_code == 0, result.output
        assert digest in result.output and "none: every byte was read" in result.output


def test_events_are_printed_for_programs_and_a_second_run_is_cached(finished: Path) -> None:
    result = cli("run", str(finished / "cut.yaml"), "--runs-dir", str(finished / "again"), "--json")
    events = [json.loads(line) for line in result.output.splitlines()]
    assert result.exit_code == 0
    assert [event["cached"] for event in events if event["event"] == "stage_finished"] == [True, True]
    assert events[-1]["event"] == "run_finished" and events[-1]["status"] == "passed"


def test_a_checkpoint_answers_in_a_chat(finished: Path, images: list[Path]) -> None:
    runs = ("--runs-dir", str(finished / "runs"))
    result = cli("chat", "exit", "--image", str(images[0]), "--prompt", "What is it?", "--max-new-tokens", "3", *runs)
    assert result.exit_code == 0, result.output
    spoken = CliRunner().invoke(app, ["chat", "exit", "--max-new-tokens", "2", *runs], input="Hello\n")
    assert spoken.exit_code == 0, spoken.output


def test_gc_keeps_what_runs_refer_to_and_says_what_would_go(finished: Path) -> None:
    runs = ("--runs-dir", str(finished / "runs"))
    made = json.loads(cli("inspect", "exit", *runs, "--json").output)["digest"]
    freed = json.loads(cli("gc", "--dry-run", "--check", *runs, "--json").output)
    assert freed["dry_run"] and made not in freed["removed"] and freed["found_damaged"] == []
    assert cli("gc", "--dry-run", *runs).output.splitlines()[-1].startswith("would free ")


def test_the_doctor_names_what_is_here_and_what_is_missing() -> None:
    result = cli("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(result.output)}
    assert findings["python"]["state"] == "ok" and "GiB free of" in findings["memory"]["detail"]
    missing = [name for name, finding in findings.items() if finding["state"] == "missing"]
    assert result.exit_code == (1 if missing else 0)
    assert all(findings[name]["fix"] for name in missing)
    assert findings["llama.cpp"]["state"] == "ok" and findings["llama.cpp"]["detail"].startswith("ggml ")


def test_the_doctor_knows_a_llama_cpp_that_may_end_with_an_illegal_instruction(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from stages.runtimes import llamacpp_build

    for name, code in (("ggml-base", ""), ("ggml-cpu", "int ggml_cpu_has_amx_int8(void) { return 1; }")):
        subprocess.run(
            ["cc", "-shared", "-x", "c", "-", "-o", tmp_path / f"lib{name}.so"], input=code.encode(), check=True
        )
    monkeypatch.setattr(llamacpp_build, "_libraries", lambda: tmp_path)
    assert llamacpp_build.uses_amx()
    monkeypatch.setattr(llamacpp_build, "llama_cpp_build", lambda: "ggml 0.25.3, commit x, libllama.so sha256:0")
    (finding,) = [one for one in examine() if one.name == "llama.cpp"]
    assert finding.state == "warning" and "CMAKE_ARGS" in finding.fix


def test_ctrl_c_outside_a_run_ends_quietly() -> None:
    # Shells start background jobs with SIGINT ignored, and Python then leaves it so.
    code = "import os, signal, sys; from pipeline import cli; import pipeline.commands.runs as r\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "def stop(*a): os.kill(os.getpid(), signal.SIGINT)\n"
    code += "r.list_runs = stop; sys.argv = ['pipeline', 'runs']; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and "Traceback" not in done.stderr
