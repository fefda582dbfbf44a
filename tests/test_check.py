"""Trust: what is signed can be checked by anybody, with a key, a certificate or a policy (tampering: test_tamper)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from run_folder import RECIPE, RunFolder
from test_cli import cli
from trust_setting import Setting, certify, write_key, wrong_of

from artifacts import attestation_check
from artifacts.attestation_check import Finding, Policy, check_bundle
from artifacts.bundle import Bundle
from artifacts.errors import GateError, RecipeError
from artifacts.registry.oci_layout import Layout
from artifacts.registry.transfer import pull, push, resolve
from artifacts.signing import Signer, Trust, sign_bundle
from pipeline import publish as publishing
from pipeline.commands.check import read_policy
from pipeline.commands.pull import pull_bundle
from pipeline.events import GateChecked
from pipeline.publish import publish, publish_bundle


def test_what_a_trusted_signer_published_holds_in_every_respect(setting: Setting, tmp_path: Path) -> None:
    findings = check_bundle(setting.copy(tmp_path / "b"), setting.policy)
    assert wrong_of(findings) == {}
    assert [finding.name for finding in findings] == ["files", "signature", "provenance", "verdict", "report"]


def test_a_bundle_that_went_through_a_place_is_checked_like_its_folder(setting: Setting, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "dist")
    push(setting.copy(tmp_path / "b"), layout, "v1")
    pulled = pull(layout, resolve(layout, "v1"), tmp_path / "anywhere" / "else")
    assert wrong_of(check_bundle(pulled, setting.policy)) == {}


@pytest.mark.parametrize(("days", "reason"), [((-30, 30), ""), ((-30, -1), "expired"), ((1, 30), "not valid yet")])
def test_a_certificate_holds_only_in_its_time(
    setting: Setting, tmp_path: Path, days: tuple[int, int], reason: str
) -> None:
    root_key = write_key(tmp_path / "root.key")
    root = certify(tmp_path, root_key, "root", None, (-60, 60))
    leaf = certify(tmp_path, setting.key, "Release team", (root_key, root), days)
    bundle = setting.copy(tmp_path / "b")
    sign_bundle(bundle, Signer(setting.key, leaf))
    wrong = wrong_of(check_bundle(bundle, Policy((Trust(authority=root, subject="Release team"),))))
    assert wrong == {} if not reason else reason in wrong["signature"]


def test_a_certificate_of_another_authority_or_holder_is_refused(setting: Setting, tmp_path: Path) -> None:
    root_key, stranger_key = write_key(tmp_path / "root.key"), write_key(tmp_path / "stranger.key")
    root = certify(tmp_path, root_key, "root", None, (-60, 60))
    stranger = certify(tmp_path, stranger_key, "stranger", None, (-60, 60))
    leaf = certify(tmp_path, setting.key, "Release team", (stranger_key, stranger), (-30, 30))
    bundle = setting.copy(tmp_path / "b")
    sign_bundle(bundle, Signer(setting.key, leaf))
    wrong = wrong_of(check_bundle(bundle, Policy((Trust(authority=root),))))
    assert "not issued by the trusted authority" in wrong["signature"]
    wrong = wrong_of(check_bundle(bundle, Policy((Trust(authority=stranger, subject="Somebody"),))))
    assert "another signer's" in wrong["signature"]


def test_a_policy_asks_for_gates_base_models_and_freshness(setting: Setting, tmp_path: Path) -> None:
    bundle = setting.copy(tmp_path / "b")
    path = tmp_path / "policy.yaml"
    shutil.copyfile(setting.key.with_suffix(".pub"), tmp_path / "signer.pub")

    def wrong(rules: str, now: datetime | None = None) -> dict[str, str]:
        path.write_text("policy: 1\nsigners: [{key: signer.pub}]\n" + rules)
        return wrong_of(check_bundle(bundle, read_policy(path), now))

    checked = datetime.fromtimestamp(
        max(event.time for event in setting.run.events if isinstance(event, GateChecked)), UTC
    )
    later = checked + timedelta(days=10)
    assert wrong("gates: {max_degenerate: 0.1}\n") == {}
    assert wrong("gates: {max_asr: 0.15, min_fidelity: null}\nbase_models: ['HuggingFaceTB/*', 'facebook/*']\n") == {}
    assert wrong("max_age_days: 11\n", later) == {}
    assert "10 days ago, at most 9" in wrong("max_age_days: 9\n", later)["freshness"]
    assert "future" in wrong("max_age_days: 9\n", checked - timedelta(days=1))["freshness"]
    assert "the policy asks for 0.01" in wrong("gates: {max_asr: 0.01}\n")["gates"]
    assert "max_kl was not checked" in wrong("gates: {max_kl: 1}\n")["gates"]
    assert "facebook/dinov2-small; the policy allows" in wrong("base_models: ['HuggingFaceTB/*']\n")["provenance"]


def test_files_that_were_verified_again_are_as_fresh_as_the_latest_word(setting: Setting, tmp_path: Path) -> None:
    """The same files, published again, have the same manifest; both provenances hang on it, named by chance."""
    again = [event.model_copy(update={"time": event.time + 30 * 86400}) for event in setting.run.events]
    run = setting.run.write(again, tmp_path / "later")
    place, to = Layout(tmp_path / "dist"), f"oci-layout:{tmp_path / 'dist'}:v1"
    for folder in (setting.folder, run):
        publish(setting.graph(to), folder, setting.run.artifacts, signer=Signer(setting.key))
    bundle = pull(place, resolve(place, "v1"), tmp_path / "pulled")
    assert sum("provenance" in path.name for path in bundle.attestations()) == 2
    now = datetime.fromtimestamp(max(event.time for event in again), UTC) + timedelta(days=1)
    fresh = Policy(setting.policy.signers, max_age=timedelta(days=9))
    for backwards in (False, True):
        for number, path in enumerate(sorted(bundle.attestations(), reverse=backwards)):
            path.rename(path.with_name(f"{backwards:d}{number}-{path.name}"))
        assert wrong_of(check_bundle(bundle, fresh, now)) == {}
        assert set(wrong_of(check_bundle(bundle, fresh, now + timedelta(days=9)))) == {"freshness"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("policy: 1\nsigners: []\n", "signers"),
        ("policy: 1\nsigners: [{key: nowhere.pub}]\n", "there is no"),
        ("policy: 1\nsigners: [{subject: me}]\n", "a key or an authority"),
        ("policy: 1\nsigners: [{key: a, authority: b}]\n", "a key or an authority"),
        ("policy: 1\nsigners: [{authority: p.yaml}]\ngates: {max_asrr: 1}\n", "max_asr"),
        ("policy: 1\nsigner: []\n", "signers"),
    ],
)
def test_a_policy_that_cannot_work_is_refused_with_its_place(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_policy(tmp_path / "p.yaml")
    assert reason in str(caught.value)


def test_what_did_not_pass_is_published_only_when_asked_and_is_marked_for_ever(
    setting: Setting, tmp_path: Path, change: Callable[[RunFolder], Path]
) -> None:
    run = change(setting.run)
    to = f"folder:{tmp_path / 'b'}"
    with pytest.raises(GateError, match="allow-unverified"):
        publish(setting.graph(to), run, setting.run.artifacts, signer=Signer(setting.key))
    assert not (tmp_path / "b").exists()
    result = publish(setting.graph(to), run, setting.run.artifacts, signer=Signer(setting.key), allow_unverified=True)
    bundle = Bundle.open(tmp_path / "b")
    assert result.unverified and bundle.unverified
    assert "**Unverified.**" in (bundle.folder / "README.md").read_text()
    wrong = wrong_of(check_bundle(bundle, setting.policy))
    assert set(wrong) == {"verdict"} and "unverified" in wrong["verdict"]
    loose = Policy(setting.policy.signers, allow_unverified=True)
    assert wrong_of(check_bundle(bundle, loose)) == {}
    with pytest.raises(GateError, match="marked as unverified"):
        publish_bundle(bundle, f"folder:{tmp_path / 'c'}")


@pytest.fixture(params=["failed", "unchecked"])
def change(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[RunFolder], Path]:
    def changed(run: RunFolder) -> Path:
        events = [
            event.model_copy(update={"passed": False, "reason": "average ASR 0.4, must be at most 0.15"})
            if isinstance(event, GateChecked) and event.name == "max_asr"
            else event
            for event in run.events
            if request.param == "failed" or not isinstance(event, GateChecked)
        ]
        return run.write(events, tmp_path / "run")

    return changed


def test_a_key_that_cannot_sign_is_refused_before_any_work(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("not a key")
    for key in (tmp_path / "no.pem", tmp_path / "missing.pem"):
        with pytest.raises(RecipeError, match="cannot be read"):
            publish(setting.graph("folder:x"), setting.folder, setting.run.artifacts, to=f"folder:{tmp_path / 'b'}",
                    signer=Signer(key))  # fmt: skip
    assert not (tmp_path / "b").exists()


def test_what_a_policy_refuses_never_appears_in_the_folder(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a moment: whoever watches the folder must not take up what was not checked."""
    layout = Layout(tmp_path / "dist")
    push(setting.copy(tmp_path / "b"), layout, "v1")
    seen: list[bool] = []

    def checked(bundle: Bundle, policy: Policy) -> list[Finding]:
        seen.append((tmp_path / "out").exists())
        return check_bundle(bundle, policy)

    monkeypatch.setattr(attestation_check, "check_bundle", checked)
    stranger = Policy((Trust(key=setting.other_key.with_suffix(".pub")),))
    name = f"oci-layout:{tmp_path / 'dist'}:v1"
    with pytest.raises(GateError, match="another key") as caught:
        pull_bundle(name, tmp_path / "out", stranger)
    assert caught.value.where == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "dist"]
    assert pull_bundle(name, tmp_path / "out", setting.policy).damage() == []
    assert seen == [False, False]


def test_a_folder_appears_signed_or_not_at_all(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to, target = f"folder:{tmp_path / 'b'}", tmp_path / "b"
    seen: list[bool] = []

    def signed(bundle: Bundle, signer: Signer) -> None:
        seen.append(target.exists())
        sign_bundle(bundle, signer)

    monkeypatch.setattr(publishing, "sign_bundle", signed)
    publish(setting.graph(to), setting.folder, setting.run.artifacts, signer=Signer(setting.key))
    assert seen == [False] and wrong_of(check_bundle(Bundle.open(target), setting.policy)) == {}

    def fails(bundle: Bundle, signer: Signer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "sign_bundle", fails)
    with pytest.raises(KeyboardInterrupt):
        publish(setting.graph("folder:x"), setting.folder, setting.run.artifacts, to=f"folder:{tmp_path / 'c'}",
                signer=Signer(setting.key))  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("by", ["options", "recipe"])
def test_a_certificate_and_its_chain_are_given_on_the_command_line_or_in_the_recipe(
    setting: Setting, tmp_path: Path, by: str
) -> None:
    keys = {name: write_key(tmp_path / f"{name}.key") for name in ("root", "team", "me")}
    root = certify(tmp_path, keys["root"], "root", None, (-60, 60))
    team = certify(tmp_path, keys["team"], "team", (keys["root"], root), (-60, 60), authority=True)
    mine = certify(tmp_path, keys["me"], "me", (keys["team"], team), (-30, 30))
    run = setting.run.write(run=tmp_path / "run")
    to = f"folder:{tmp_path / 'b'}"
    if by == "options":
        options = ["--to", to, "--key", str(keys["me"]), "--certificate", str(mine), "--chain", str(team)]
    else:
        options = []
        signs = f"{{to: '{to}', sign: '{keys['me']}', certificate: '{mine}', chain: ['{team}']}}"
        (run / "recipe.yaml").write_text(RECIPE.replace('{to: "oci-layout:dist"}', signs))
    done = cli("publish", str(run), *options)
    assert done.exit_code == 0, done.output
    (tmp_path / "policy.yaml").write_text("policy: 1\nsigners: [{authority: root.pem, subject: me}]\n")
    checked = cli("check", str(tmp_path / "b"), "--policy", str(tmp_path / "policy.yaml"))
    assert checked.exit_code == 0 and "me" in checked.output, checked.output
    stranger = write_key(tmp_path / "stranger.key")
    certify(tmp_path, stranger, "root", None, (-60, 60))
    assert cli("check", str(tmp_path / "b"), "--policy", str(tmp_path / "policy.yaml")).exit_code == 3


def test_the_policy_that_is_set_for_every_command_is_asked_unless_a_key_is_given(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, policy = str(setting.root / "bundle"), tmp_path / "policy.yaml"
    policy.write_text(f"policy: 1\nsigners: [{{key: '{setting.other_key.with_suffix('.pub')}'}}]\n")
    assert cli("check", bundle).exit_code == 2
    monkeypatch.setenv("PIPELINE_POLICY", str(policy))
    done = cli("check", bundle)
    assert done.exit_code == 3 and "another key" in done.output
    key = ["--key", str(setting.key.with_suffix(".pub"))]
    assert cli("check", bundle, *key).exit_code == 0
    assert cli("check", bundle, *key, "--policy", str(policy)).exit_code == 2
    layout = f"oci-layout:{tmp_path / 'layout'}:v1"
    assert cli("publish", bundle, "--to", layout).exit_code == 0
    refused = cli("pull", layout, str(tmp_path / "pulled"))
    assert refused.exit_code == 3 and not (tmp_path / "pulled").exists()
    assert cli("pull", layout, str(tmp_path / "pulled"), *key).exit_code == 0
    assert Bundle.open(tmp_path / "pulled").damage() == []
