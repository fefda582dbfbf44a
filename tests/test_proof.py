"""Publishing a bundle that exists: only one whose own papers show that these very files passed, or marked for ever."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from registry_setting import small_bundle
from run_folder import RunFolder
from test_cli import cli
from trust_setting import Setting, rebuilt

from artifacts.bundle import ARTIFACT, Bundle
from artifacts.errors import GateError, RecipeError
from pipeline.events import GateChecked
from pipeline.graph import build_graph
from pipeline.publish import publish, publish_bundle
from pipeline.recipe import load_recipe


def test_a_bundle_that_passed_goes_on_unchanged(setting: Setting, tmp_path: Path) -> None:
    bundle = setting.copy(tmp_path / "b")
    done = publish_bundle(bundle, f"folder:{tmp_path / 'c'}")
    assert not done.unverified and done.digest == bundle.digest == Bundle.open(tmp_path / "c").digest
    assert len(Bundle.open(tmp_path / "c").attestations()) == 3


def _report(**told: object) -> Callable[[Bundle], dict[str, bytes]]:
    """What a report says of its first gate, `max_asr`, changed."""

    def changed(bundle: Bundle) -> dict[str, bytes]:
        report = json.loads((bundle.folder / "report.json").read_bytes())
        report["gates"][0].update(told)
        return {"report.json": json.dumps(report).encode()}

    return changed


def _elsewhere(bundle: Bundle) -> bytes:
    """The recipe of a source that is not on this machine: nothing can be planned from it."""
    recipe = (bundle.folder / "recipe.yaml").read_text()
    return recipe.replace("demo:smol-llava", "/nowhere/model").encode()


def _tighter(bundle: Bundle) -> dict[str, bytes]:
    return {"recipe.yaml": (bundle.folder / "recipe.yaml").read_bytes().replace(b"max_asr: 0.15", b"max_asr: 0.01")}


_WRONG: dict[str, tuple[Callable[[Bundle], dict[str, bytes]], str]] = {
    "other weights": (lambda _: {"model.gguf": b"GGUF other"}, "model.gguf is not the file that the verified"),
    "other measures": (lambda _: {"verdict/icet/measures.json": b"[]\n"}, "measures beside .* are not the verdict's"),
    "a failed gate": (_report(passed=False, reason="ASR 0.4"), "max_asr: ASR 0.4"),
    "a looser limit": (_report(limit=0.9), "held to 0.9, the recipe's limit is 0.15"),
    "a nicer value": (_report(value=0.001), "max_asr: 0.001 is told, the measures give 0.08"),
    "another name": (_report(name="max_kl"), "max_asr: no result"),
    "a limit that the measures do not keep": (_tighter, "max_asr: .* must be at most 0.01"),
    "no gates": (lambda bundle: {"recipe.yaml": _tighter(bundle)["recipe.yaml"].partition(b"gates:")[0]}, "no gate"),
    "no recipe": (lambda _: {"recipe.yaml": b"recipe: 7\n"}, "its recipe cannot be read"),
}


@pytest.mark.parametrize("kind", _WRONG)
def test_a_bundle_whose_papers_do_not_show_that_it_passed_is_refused(
    setting: Setting, tmp_path: Path, kind: str
) -> None:
    change, reason = _WRONG[kind]
    old = Bundle.open(setting.root / "bundle")
    bundle = rebuilt(old, tmp_path / "b", change(old))
    assert bundle.damage() == []
    with pytest.raises(GateError, match=reason) as caught:
        publish_bundle(bundle, f"folder:{tmp_path / 'c'}")
    assert "--allow-unverified" in str(caught.value) and caught.value.exit_code == 3
    assert not (tmp_path / "c").exists()


def test_a_control_does_not_pass_for_what_ships(setting: Setting, tmp_path: Path) -> None:
    """It was measured in the same verdict, and is not hardened."""
    old, control = Bundle.open(setting.root / "bundle"), setting.run.artifacts["plain"]
    report = json.loads((old.folder / "report.json").read_bytes())
    for row in report["artifacts"]:
        row["shipped"] = row["stage"] == "plain"
    changes = {
        "manifest.json": (control.path / "manifest.json").read_bytes(), "report.json": json.dumps(report).encode(),
    }  # fmt: skip
    bundle = rebuilt(old, tmp_path / "b", changes, **{ARTIFACT: control.digest})
    with pytest.raises(GateError, match="is not what the recipe ships"):
        publish_bundle(bundle, f"folder:{tmp_path / 'c'}")


def test_a_bundle_whose_source_is_elsewhere_is_held_to_its_recipes_limits(setting: Setting, tmp_path: Path) -> None:
    old = Bundle.open(setting.root / "bundle")
    there = rebuilt(old, tmp_path / "b", {"recipe.yaml": _elsewhere(old)})
    with pytest.raises(RecipeError):
        build_graph(load_recipe(there.folder / "recipe.yaml", ["publish=null"]))
    publish_bundle(there, f"folder:{tmp_path / 'c'}")
    for change, reason in (({"limit": 0.9}, "the recipe's limit is 0.15"), ({"value": 0.2}, "0.2 where the limit is")):
        bundle = rebuilt(there, tmp_path / reason, _report(**change)(old))
        with pytest.raises(GateError, match=reason):
            publish_bundle(bundle, f"folder:{tmp_path / 'd'}")


def test_what_is_passed_on_unverified_is_said_loudly_and_marked(setting: Setting, tmp_path: Path) -> None:
    bundle, to = small_bundle(tmp_path / "b"), f"folder:{tmp_path / 'c'}"
    refused = cli("publish", str(bundle.folder), "--to", to)
    assert refused.exit_code == 3 and "--allow-unverified" in refused.output and "verdict" in refused.output
    assert "no artifact at" in refused.output and not (tmp_path / "c").exists()
    done = cli("publish", str(bundle.folder), "--to", to, "--allow-unverified")
    assert done.exit_code == 0 and "WARNING: published UNVERIFIED" in done.stderr
    marked = Bundle.open(tmp_path / "c")
    assert marked.unverified and marked.damage() == [] and marked.digest in done.stdout != bundle.digest
    assert dict(marked.manifest.files) == dict(bundle.manifest.files)
    assert "unverified" in cli("publish", str(marked.folder), "--to", f"folder:{tmp_path / 'd'}").output
    again = publish_bundle(marked, f"folder:{tmp_path / 'd'}", allow_unverified=True)
    assert again.unverified and again.digest == marked.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c", "d"]


def test_what_attested_a_bundle_does_not_go_with_its_marked_copy(setting: Setting, tmp_path: Path) -> None:
    old = Bundle.open(setting.root / "bundle")
    bundle = rebuilt(old, tmp_path / "b", {"recipe.yaml": b"recipe: 7\n"}, attested=True)
    publish_bundle(bundle, f"folder:{tmp_path / 'c'}", allow_unverified=True)
    assert len(bundle.attestations()) == 3 and Bundle.open(tmp_path / "c").attestations() == []


@pytest.mark.parametrize(
    ("changed", "reason"), [({"limit": 0.9}, "held to 0.9, the recipe's"), ({"value": 0.0}, "0.0 is told, the mea")]
)
def test_what_a_run_says_of_a_gate_counts_only_as_its_measures_say_it(
    setting: Setting, tmp_path: Path, changed: dict[str, float], reason: str
) -> None:
    events = [
        event.model_copy(update=changed) if isinstance(event, GateChecked) and event.name == "max_asr" else event
        for event in setting.run.events
    ]
    folder = setting.run.write(events, tmp_path / "run")
    with pytest.raises(GateError, match=f"max_asr: .*{reason}"):
        publish(setting.graph("folder:unused"), folder, setting.run.artifacts, to=f"folder:{tmp_path / 'b'}")
    assert not (tmp_path / "b").exists()


def test_a_run_whose_measures_do_not_keep_a_gate_is_refused_whatever_it_says(tmp_path: Path, setting: Setting) -> None:
    bad = RunFolder(tmp_path / "made", asr={"source": 0.3, "harden": 0.3, "plain": 0.4, "gguf": 0.3})
    events = [
        event.model_copy(update={"passed": True}) if isinstance(event, GateChecked) else event for event in bad.events
    ]
    with pytest.raises(GateError, match=r"max_asr: .* at most 0.15"):
        publish(setting.graph("folder:unused"), bad.write(events), bad.artifacts, to=f"folder:{tmp_path / 'b'}")
