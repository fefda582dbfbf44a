"""The command line: every command calls one function and prints what it returns; heavy imports wait until then."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from artifacts.errors import PipelineError
from pipeline import cli_publish, cli_verify
from pipeline.cli_options import RUNS, AsJson, RunsDir, print_json

Overrides = Annotated[
    list[str], typer.Option("--set", help="Change a value, e.g. --set stages.harden.with.steps=4.", metavar="A.B=C")
]
RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.", metavar="RECIPE")]
ArtifactName = Annotated[
    str,
    typer.Argument(
        help="A folder, a digest (8 digits or more), a stage id of the latest run, or RUN:STAGE.", metavar="ARTIFACT"
    ),
]


class _Group(TyperGroup):
    """The one place where errors become words and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PipelineError as error:
            _print_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise typer.Exit(0) from None
        except OSError as error:
            # A full disk or a folder without rights, outside the store (which explains its own).
            _print_error(PipelineError(error.strerror or str(error), where=str(error.filename or "") or None))
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_error(error: PipelineError) -> None:
    if "--json" in sys.argv[1:]:
        print(json.dumps({"error": error.to_dict()}))
    else:
        print(f"error: {error}", file=sys.stderr)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"pipeline {version('icet-pipeline')}")
        raise typer.Exit


@app.callback()
def pipeline(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Compress a vision-language model, keep it safe, and prove it on the quantized files that ship.

    \b
    Example: pipeline run quickstart
    Exit codes: 0 done, 1 a stage failed, 2 the recipe or the arguments are wrong, 3 a gate failed.
    """


@app.command()
def run(
    recipe: RecipeName,
    set: Overrides = [],  # noqa: B006 - Typer copies it
    runs_dir: RunsDir = RUNS,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Stages that may run at the same time.")] = 1,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live view.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe. What is in the store is reused; an interrupted run continues where it was.

    \b
    Example: pipeline run quickstart
             pipeline run my.yaml --set stages.harden.with.steps=4 --jobs 2
    """
    from pipeline.commands.load import load_graph
    from pipeline.commands.runs import told
    from pipeline.console import make_console, progress_line
    from pipeline.fetch import fetch_unpinned
    from pipeline.runner import run_graph

    graph = load_graph(recipe, set)
    with progress_line(quiet=as_json) as report:
        came = fetch_unpinned(graph, report)
    if came:
        graph = load_graph(recipe, set)  # what a model is, is known now
    result = run_graph(graph, runs_dir, make_console(plain=plain, json=as_json), jobs)
    if result.error is not None and (as_json or not told(result.folder)):
        _print_error(result.error)
    raise typer.Exit(result.exit_code)


@app.command()
def plan(
    recipe: RecipeName,
    set: Overrides = [],  # noqa: B006
    explore: Annotated[
        bool,
        typer.Option(
            "--explore", help="Also show what fewer bits, an earlier exit or fewer blocks would take, and their KL."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a recipe and show what it would do. Says what is cached and the memory that the result will need.

    \b
    Example: pipeline plan quickstart
             pipeline plan my.yaml --explore --set device=phone-2gb
    """
    from pipeline.commands.load import load_graph
    from pipeline.commands.plan import make_plan, show_plan

    graph = load_graph(recipe, set, within_budget=not explore)
    found = make_plan(graph)
    if not explore:
        if as_json:
            print_json(found.to_dict())
        else:
            print(show_plan(found))
        return
    from pipeline.commands.explore import explore as ways_of
    from pipeline.commands.explore import show_explored

    ways = ways_of(graph)
    if as_json:
        print_json(found.to_dict() | {"explore": [one.to_dict() for one in ways]})
    else:
        print(show_plan(found))
        print(show_explored(ways))


@app.command()
def runs(runs_dir: RunsDir = RUNS, as_json: AsJson = False) -> None:
    """List the runs and how they ended.

    \b
    Example: pipeline runs
    """
    from dataclasses import asdict

    from pipeline.commands.runs import list_runs, show_runs

    found = list_runs(runs_dir)
    if as_json:
        print_json([asdict(run) for run in found])
    else:
        print(show_runs(found, runs_dir))


@app.command()
def report(
    run: Annotated[
        str | None, typer.Argument(help="A run's id, its beginning, or its folder; default: latest.")
    ] = None,
    runs_dir: RunsDir = RUNS,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Write the page again from the run's events.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write the curve of ASR by exit to this file.")] = None,
    training_svg: Annotated[
        Path | None, typer.Option("--training-svg", help="Write the curves of the trainings to this file.")
    ] = None,
    inspect_log: Annotated[
        Path | None, typer.Option("--inspect-log", help="Write logs for inspect_ai's viewer into this folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show where a run's report is. Can write it again from the run's events, draw its curve, or open it.

    \b
    Example: pipeline report
             pipeline report quickstart-20260101 --rebuild --open
             pipeline report --svg docs/asr-by-exit.svg
             pipeline report --inspect-log logs && inspect view --log-dir logs
    """
    from pipeline.commands.report import draw_curve, find_report, write_logs

    page, machine = find_report(run, runs_dir, rebuild=rebuild)
    if svg is not None:
        draw_curve(machine, svg)
    if training_svg is not None:
        draw_curve(machine, training_svg, training=True)
    if inspect_log is not None:
        write_logs(machine, inspect_log)
    if as_json:
        print(machine.read_text(encoding="utf-8"))
    else:
        print(page)
    if open_page:
        typer.launch(str(page))


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes.

    \b
    Example: pipeline recipes
    """
    from recipes import purpose, shipped

    found = {name: {"path": str(path), "purpose": purpose(path)} for name, path in shipped().items()}
    if as_json:
        print_json(found)
        return
    width = max(map(len, found), default=0)
    for name, entry in found.items():
        print(f"{name.ljust(width)}  {entry['purpose']}")


@app.command()
def families(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The whole of docs/families.md.")] = False,
) -> None:
    """List the model families, and what each stage and runtime can do with them.

    \b
    Example: pipeline families
             pipeline families --markdown > docs/families.md
    """
    from pipeline.commands.families import list_families, show_families, write_families

    found = list_families()
    if as_json:
        print_json([family.to_dict() for family in found])
    else:
        print(write_families(found) if markdown else show_families(found))


@app.command()
def stages(
    name: Annotated[str | None, typer.Argument(help="One stage, with all its parameters.")] = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The whole of docs/stages.md.")] = False,
) -> None:
    """List what a recipe may use, or every parameter of one stage.

    \b
    Example: pipeline stages
             pipeline stages l-ppo
             pipeline stages --markdown > docs/stages.md
    """
    from pipeline.commands.stages import find_stage, list_stages, show_stage, show_stages, write_stages

    found = list_stages() if name is None else [find_stage(name)]
    if as_json:
        print_json([kind.to_dict() for kind in found])
    elif markdown:
        print(write_stages(found))
    else:
        print(show_stages(found) if name is None else show_stage(found[0]))


class SchemaKind(StrEnum):
    """What `pipeline schema` can print."""

    recipe = "recipe"
    report = "report"


@app.command()
def schema(
    kind: Annotated[SchemaKind, typer.Argument(help="What to describe.")] = SchemaKind.recipe,
) -> None:
    """Print a JSON Schema. Of a recipe, for your editor, or of report.json.

    \b
    Example: pipeline schema > recipe.schema.json
             pipeline schema report
    """
    if kind is SchemaKind.report:
        from pipeline.report.model import Report

        print_json(Report.model_json_schema())
        return
    from pipeline.schema import recipe_schema

    print_json(recipe_schema())


@app.command()
def inspect(artifact: ArtifactName, runs_dir: RunsDir = RUNS, as_json: AsJson = False) -> None:
    """Show what an artifact is. Files, metadata, lineage; every byte is read, to find damage.

    \b
    Example: pipeline inspect gguf
             pipeline inspect 4f1c09ab
    """
    from pipeline.commands.inspect import inspect_artifact, show_inspection
    from pipeline.commands.load import find_artifact

    found = inspect_artifact(find_artifact(artifact, runs_dir))
    if as_json:
        print_json(found.to_dict())
    else:
        print(show_inspection(found))
    if found.damage:
        raise typer.Exit(1)


@app.command()
def fetch(recipe: RecipeName, set: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Download all that a recipe reads. Afterwards it runs without a network.

    \b
    Example: pipeline fetch quickstart
    """
    from pipeline.commands.load import load_graph
    from pipeline.console import progress_line
    from pipeline.device import show_bytes
    from pipeline.fetch import fetch_recipe

    with progress_line(quiet=as_json) as report:
        fetched = fetch_recipe(load_graph(recipe, set), report)
    if as_json:
        print_json([item.__dict__ for item in fetched])
        return
    for item in fetched:
        print(f"{item.source}  {show_bytes(item.size)}  {item.path}")
    if not fetched:
        print("this recipe reads nothing from the network")


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    check: Annotated[bool, typer.Option("--check", help="First read every byte of the store, to find damage.")] = False,
    runs_dir: RunsDir = RUNS,
    as_json: AsJson = False,
) -> None:
    """Free what no run refers to. Keeps all that a run made or used, in every folder where runs were started.

    \b
    Example: pipeline gc --dry-run
             pipeline gc --check
    """
    from dataclasses import asdict

    from pipeline.commands.load import open_store
    from pipeline.device import show_bytes
    from pipeline.gc import check as check_store
    from pipeline.gc import collect

    store = open_store()
    damaged = check_store(store) if check else []
    freed = collect(store, [runs_dir], dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "found_damaged": damaged, **asdict(freed)})
        return
    for line in damaged:
        print(line)
    for digest in freed.removed:
        print(f"artifact {digest}")
    print(
        f"{'would free' if dry_run else 'freed'} {show_bytes(freed.bytes)}: {len(freed.removed)} artifacts, "
        f"{len(freed.checkpoints)} checkpoints, {len(freed.unfinished)} unfinished, {len(freed.damaged)} damaged"
    )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed and what is missing. And how to get it.

    \b
    Example: pipeline doctor
    """
    from pipeline.doctor import examine, show_findings

    findings = examine()
    if as_json:
        print_json([finding.__dict__ for finding in findings])
    else:
        print(show_findings(findings))
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


cli_verify.commands(app)
cli_publish.commands(app)


def main() -> None:
    """The console command `pipeline`."""
    app(prog_name="pipeline")


if __name__ == "__main__":
    main()
