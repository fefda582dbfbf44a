"""The command line of measuring without a recipe, and of setting what was measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import RUNS, AsJson, RunsDir, print_json


def commands(app: typer.Typer) -> None:
    """Add these commands to the program."""
    for command in (verify, compare):
        app.command()(command)


def verify(
    target: Annotated[
        str,
        typer.Argument(
            help="A GGUF file, a folder (checkpoint, GPTQ, GGUF, bundle), a Hugging Face id, demo:NAME, a published "
            "model's reference, or an artifact.",
            metavar="TARGET",
        ),
    ],
    mmproj: Annotated[
        str | None, typer.Option("--mmproj", help="Its image encoder; default: beside it; none: without.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="The uncompressed model to compare with.", metavar="MODEL")
    ] = None,
    exits: Annotated[str, typer.Option("--exits", help="all, or numbers: 1,5,9.")] = "all",
    gate: Annotated[
        list[str], typer.Option("--gate", help="What must hold, e.g. max_asr=0.15; as in a recipe.", metavar="NAME=X")
    ] = [],  # noqa: B006
    judge: Annotated[
        list[str],
        typer.Option(
            "--judge", help="Who says what is unsafe; the first decides. Default: refusal-rule.", metavar="JUDGE"
        ),
    ] = [],  # noqa: B006
    set: Annotated[
        list[str],
        typer.Option("--set", help="A parameter of icet-verify: `pipeline stages icet-verify`.", metavar="NAME=X"),
    ] = [],  # noqa: B006
    device: Annotated[str | None, typer.Option("--device", help="Memory budget, e.g. laptop-8gb.")] = None,
    runs_dir: RunsDir = RUNS,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live view.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how safe a model is at every exit. No recipe needed; the same report, JSON and exit codes as `run`.

    \b
    Example: pipeline verify model.gguf --mmproj mmproj.gguf --gate max_asr=0.15
             pipeline verify llava-hf/llava-1.5-7b-hf --exits 18,23 --set harmful.advbench=50
             pipeline verify gguf --baseline ./my-llava --gate max_kl=0.2 --gate memory=device --device laptop-2gb
    """
    from pipeline.commands.runs import told
    from pipeline.commands.verify import Wanted, verification
    from pipeline.console import make_console, progress_line
    from pipeline.fetch import fetch_recipe
    from pipeline.runner import run_graph

    wanted = Wanted(target, mmproj, baseline, exits, judge, gate, set, device)
    with progress_line(quiet=as_json) as report:
        fetch_recipe(verification(wanted, runs_dir), report)
    # Once more: only now it is known what a hub's model is.
    result = run_graph(verification(wanted, runs_dir), runs_dir, make_console(plain=plain, json=as_json))
    if result.error is not None and (as_json or not told(result.folder)):
        raise result.error
    raise typer.Exit(result.exit_code)


def compare(
    first: Annotated[
        str, typer.Argument(help="A run, RUN:STAGE, a run's folder, or an artifact that was verified.", metavar="A")
    ],
    second: Annotated[str, typer.Argument(help="The same.", metavar="B")],
    responses: Annotated[int, typer.Option("--responses", min=0, help="Flips to show with both responses.")] = 5,
    page: Annotated[Path | None, typer.Option("--page", help="Write all flips into this HTML file.")] = None,
    runs_dir: RunsDir = RUNS,
    as_json: AsJson = False,
) -> None:
    """Set two verified models side by side. Per-exit differences with intervals, flips, both responses.

    \b
    Example: pipeline compare quickstart-20260101:source quickstart-20260101
             pipeline compare 4f1c09ab 77d0aa31 --page flips.html
    """
    from pipeline.commands.compare import compare_models, comparison_dict, show_comparison, write_page

    found = compare_models(first, second, runs_dir)
    if page is not None:
        write_page(found, page)
    if as_json:
        print_json(comparison_dict(found))
    else:
        print(show_comparison(found, responses))
