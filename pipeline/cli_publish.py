"""The command line, second half: what ships, from publishing to answering on a laptop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import RUNS, AsJson, RunsDir, print_json

ModelName = Annotated[
    str,
    typer.Argument(
        help="A bundle's folder, oci:HOST/NAME:TAG, oci-layout:FOLDER:TAG, a GGUF file, or an artifact "
        "(digest, stage id of the latest run, RUN:STAGE).",
        metavar="MODEL",
    ),
]
Reference = Annotated[
    str, typer.Argument(help="oci:HOST/NAME[:TAG | @sha256:...] or oci-layout:FOLDER[:TAG].", metavar="REF")
]
Device = Annotated[
    str | None, typer.Option("--device", help="Memory budget, e.g. laptop-8gb; default: the bundle's own.")
]
Tokens = Annotated[int | None, typer.Option("--context", min=256, help="Tokens of context; default: the device's.")]
PolicyPath = Annotated[
    Path | None,
    typer.Option("--policy", help="Use it only if this policy holds.", metavar="FILE", envvar="PIPELINE_POLICY"),
]
SignerKey = Annotated[Path | None, typer.Option("--key", help="Public key (PEM) of who signed.", metavar="FILE")]
MmprojPath = Annotated[
    Path | None, typer.Option("--mmproj", help="Image encoder of a GGUF file; default: beside it.", metavar="FILE")
]
_IMAGE = "/image "

registry = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into registries and OCI layouts.")


def commands(app: typer.Typer) -> None:
    """Add these commands to the program."""
    for command in (publish, pull, check, chat, serve):
        app.command()(command)
    app.add_typer(registry, name="registry")


def publish(
    what: Annotated[
        str | None, typer.Argument(help="A run (id, its beginning, folder), or a bundle's folder; default: latest run.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="oci:HOST/NAME:TAG, oci-layout:FOLDER, folder:FOLDER, hf:USER/NAME or ollama:NAME; default: "
            "the recipe's.",
        ),
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", help="Private key (PEM) that signs.", metavar="FILE")] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", help="Certificate of that key.", metavar="FILE")
    ] = None,
    chain: Annotated[
        list[Path], typer.Option("--chain", help="Certificates between it and the authority.", metavar="FILE")
    ] = [],  # noqa: B006 - Typer copies it
    keyless: Annotated[
        bool, typer.Option("--keyless", help="Sign with an identity instead of a key (Sigstore; SIGSTORE_ID_TOKEN).")
    ] = False,
    sigstore: Annotated[
        Path | None, typer.Option("--sigstore", help="Another Sigstore than the public one.", metavar="FILE")
    ] = None,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Publish what did not pass, marked as unverified.")
    ] = False,
    runs_dir: RunsDir = RUNS,
    as_json: AsJson = False,
) -> None:
    """Publish what a run ships. With its papers and its proof; only if the verdict about these files passed.

    \b
    Example: pipeline publish --to oci:localhost:5000/me/smol:v1 --key key.pem
             pipeline publish ./bundle --to oci:localhost:5000/me/smol:v1
    """
    from artifacts.errors import RecipeError
    from artifacts.keyless import Keyless
    from artifacts.signing import Signer
    from pipeline.commands.publish import publish_named
    from pipeline.console import progress_line

    if certificate is not None and key is None:
        raise RecipeError("a certificate does not sign", way_out="add --key, the private key that belongs to it")
    if keyless and key is not None:
        raise RecipeError("--keyless and --key are two signers", way_out="leave one out")
    signer: Signer | Keyless | None = Signer(key, certificate, tuple(chain)) if key is not None else None
    if keyless:
        signer = Keyless(sigstore)
    with progress_line(quiet=as_json) as moved:
        done = publish_named(what, to, runs_dir, signer, allow_unverified=allow_unverified, moved=moved)
    if done.unverified:
        print("WARNING: published UNVERIFIED, and marked so: no passed verdict stands behind it", file=sys.stderr)
    if signer is None and to is not None and not as_json:
        print("not signed: nobody can check who made it (--key)", file=sys.stderr)
    if as_json:
        print_json({**done.__dict__, "tags": dict(done.tags)})
    else:
        print(f"{done.target}\n{done.digest}")


def pull(
    context: typer.Context,
    reference: Reference,
    folder: Annotated[Path, typer.Argument(help="Where to; it must not exist yet.", metavar="FOLDER")],
    key: SignerKey = None,
    policy: PolicyPath = None,
    as_json: AsJson = False,
) -> None:
    """Bring a published model into a folder. Every byte is checked; what was cut off goes on where it was.

    \b
    Example: pipeline pull oci:localhost:5000/me/smol:v1 smol
             pipeline pull oci:localhost:5000/me/smol:v1 smol --key signer.pub
    """
    from pipeline.commands.check import policy_of
    from pipeline.commands.pull import pull_bundle
    from pipeline.console import progress_line

    policy = _unless_key(context, key, policy)
    wanted = policy_of(key, policy) if key is not None or policy is not None else None
    with progress_line(quiet=as_json) as moved:
        bundle = pull_bundle(reference, folder, wanted, moved)
    if as_json:
        print_json({"folder": str(folder), "digest": bundle.digest, "unverified": bundle.unverified})
    else:
        print(f"{folder}\n{bundle.digest}{'  UNVERIFIED' if bundle.unverified else ''}")


def check(
    context: typer.Context,
    bundle: Annotated[str, typer.Argument(help="A bundle's folder, or a reference.", metavar="REF|DIR")],
    key: SignerKey = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            "--policy",
            help="Who may sign, which gates, which base models.",
            metavar="FILE",
            envvar="PIPELINE_POLICY",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a published model may be trusted. Signature, every byte, provenance, and the verdict about them.

    \b
    Example: pipeline check smol --key signer.pub
             pipeline check oci:localhost:5000/me/smol:v1 --policy policy.yaml
    """
    from pipeline.commands.check import check_named, policy_of, show_findings

    found, findings = check_named(bundle, policy_of(key, _unless_key(context, key, policy)))
    if as_json:
        print_json(
            {"folder": str(found.folder), "digest": found.digest, "findings": [one.__dict__ for one in findings]}
        )
    else:
        print(show_findings(found, findings))
    if not all(one.holds for one in findings):
        raise typer.Exit(3)


def _unless_key(context: typer.Context, key: Path | None, policy: Path | None) -> Path | None:
    """The policy, but for one of the environment beside a key: what is asked for by hand goes before it."""
    source = context.get_parameter_source("policy")
    return None if key is not None and source is not None and source.name == "ENVIRONMENT" else policy


@registry.command("list")
def registry_list(
    repository: Annotated[str, typer.Argument(help="oci:HOST/NAME or oci-layout:FOLDER.", metavar="REF")],
    as_json: AsJson = False,
) -> None:
    """List the tags of a repository.

    \b
    Example: pipeline registry list oci:localhost:5000/me/smol
    """
    from pipeline.commands.pull import list_tags

    tags = list_tags(repository)
    if as_json:
        print_json(tags)
    else:
        print("\n".join(tags) or "no tags")


@registry.command("show")
def registry_show(reference: Reference, as_json: AsJson = False) -> None:
    """Show what a published model is. Its files, marks and attestations; only manifests are fetched.

    \b
    Example: pipeline registry show oci:localhost:5000/me/smol:v1
    """
    from pipeline.commands.pull import show_model, show_shown

    shown = show_model(reference)
    if as_json:
        print_json(shown.to_dict())
    else:
        print(show_shown(shown))


def chat(
    model: ModelName,
    image: Annotated[Path | None, typer.Option("--image", help="A picture to ask about.", metavar="FILE")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="One question; without it, a conversation.")] = None,
    exit: Annotated[
        int | None,
        typer.Option("--exit", help="Leave the image encoder after this layer; default: the model's own."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer.")] = 256,
    device: Device = None,
    context: Tokens = None,
    policy: PolicyPath = None,
    mmproj: MmprojPath = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Ask a model a question. A GGUF in llama.cpp, a checkpoint in transformers; each question stands alone.

    In a conversation, `/image FILE` shows it another picture.

    \b
    Example: pipeline chat gguf --image cat.png --prompt "What is in the picture?"
             pipeline chat ./bundle --policy policy.yaml --image cat.png
    """
    from pipeline.commands.chat import open_chat
    from pipeline.commands.check import read_policy
    from pipeline.commands.model import find_model, room_for

    wanted = read_policy(policy) if policy is not None else None
    found = find_model(model, runs_dir, wanted, mmproj)
    if found.bundle is not None and found.bundle.unverified:
        print("WARNING: this model is marked as unverified", file=sys.stderr)
    room = None
    if found.bundle is not None or device is not None or context is not None:
        room = room_for(found, device, context)
    with open_chat(found, image, exit, max_new_tokens, room) as conversation:
        while True:
            question = prompt if prompt is not None else _ask()
            if question is None:
                return
            if question.startswith(_IMAGE):
                conversation = conversation.about(Path(question.removeprefix(_IMAGE).strip()).expanduser())
            elif question.strip():
                for piece in conversation.answer(question):
                    print(piece, end="", flush=True)
                print()
            if prompt is not None:
                return


def serve(
    model: ModelName,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; others than loopback need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help="Only who sends this key is answered.", envvar="PIPELINE_API_KEY"),
    ] = None,
    device: Device = None,
    context: Tokens = None,
    policy: PolicyPath = None,
    mmproj: MmprojPath = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Serve a model to programs that speak to OpenAI. On this machine only, within its device's memory.

    \b
    Example: pipeline serve ./bundle
             pipeline serve oci:localhost:5000/me/smol:v1 --policy policy.yaml --device laptop-2gb
    """
    from pipeline.commands.check import read_policy
    from pipeline.commands.serve import prepare, show_room
    from pipeline.commands.serve import serve as run_server

    wanted = read_policy(policy) if policy is not None else None
    found, room = prepare(model, runs_dir, device=device, context=context, policy=wanted, mmproj=mmproj)
    print(show_room(found, room, host, port), flush=True)
    run_server(found, room, host, port, api_key)


def _ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None
