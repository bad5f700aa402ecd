"""``camshaft verify``: a recipe proves on this machine that it trains what one plain process trains."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from camshaft.cli.console import OverridesArgument, RecipeArgument, columns, say
from camshaft.errors import CamshaftError, MachineError, RecipeError
from camshaft.recipe import load

if TYPE_CHECKING:
    from camshaft.recipe import Resolved
    from camshaft.verify.examine import Report


def register(app: typer.Typer) -> None:
    """Add the command to the root app."""
    app.command("verify")(verify)


def verify(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    steps: Annotated[int, typer.Option(min=2, max=100, help="Optimizer steps that are compared.")] = 4,
    on_gpu: Annotated[
        bool, typer.Option("--on-gpu", help="On this machine's GPUs, in fp32, instead of its CPU in fp64.")
    ] = False,
    own_precision: Annotated[
        bool, typer.Option("--own-precision", help="Also in the recipe's own precision, within wider bounds.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the certificate here too.")] = None,
) -> None:
    """Compare a small model trained as the recipe says with one plain process: gradients, norm, weights, state, loss.

    Exit status: 0 where all are equal; 1 where not, with the first tensor and the plugin to blame; 2 recipe; 3 machine.
    """
    from camshaft.verify import certificate
    from camshaft.verify.examine import verify as prove

    resolved = load(recipe, overrides or ())
    if output is not None:
        _make_place(output, resolved)
    report = prove(resolved, steps=steps, device="cuda" if on_gpu else "cpu", own_precision=own_precision)
    content = certificate.certificate(report, recipe, _plan_digest(resolved))
    say(_table(report, content))
    try:
        path = certificate.keep(resolved, content)
        if output is not None:
            certificate.write(output, content)
    except OSError as error:
        raise MachineError(f"the certificate cannot be written: {error}. Set data.cache_dir, or --output") from error
    say(f"certificate  {output or path}")
    if report.finding is not None:
        raise CamshaftError(str(report.finding))


def _make_place(output: Path, resolved: Resolved) -> None:
    """Make the folder of the certificate before anything is proven.

    Raises:
        RecipeError: a certificate there would replace the recipe.
        MachineError: nothing can be written there.
    """
    try:
        if output.exists() and output.samefile(resolved.path):
            raise RecipeError(f"--output {output} is the recipe: give the name of another file")
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir() or not os.access(output.parent, os.W_OK):
            raise MachineError(f"--output {output} is a folder, or in one that cannot be written. Give another file")
    except OSError as error:
        raise MachineError(f"--output {output} cannot be written: {error.strerror}. Give another file") from error


def _plan_digest(resolved: Resolved) -> str:
    """Digest of what ``camshaft plan`` shows of the recipe."""
    from camshaft.cli.plan import show
    from camshaft.host import Host
    from camshaft.verify.sorting import full_world, legal

    checked = legal(resolved, full_world(resolved))
    shown = show(resolved, checked, Host.of(resolved.recipe.plugins), None)
    return hashlib.sha256(shown.encode()).hexdigest()[:16]


def _table(report: Report, content: dict[str, Any]) -> str:
    proof = content["proof"]
    axes = " x ".join(f"{name} {degree}" for name, degree in proof["axes"].items() if degree > 1) or "one rank"
    model = proof["model"]
    lines = [
        f"result       {content['result']}, in {content['seconds']} s",
        (
            f"proof        {proof['steps']} steps in {proof['dtype']} on {proof['ranks']} {proof['device']} rank(s) "
            f"({axes}), beside one plain process"
        ),
        (
            f"model        {model['num_hidden_layers']} layers of width {model['hidden_size']}, "
            f"{model['num_attention_heads']} heads on {model['num_key_value_heads']}, {model['vocab_size']} tokens"
        ),
        f"compared     {', '.join(proof['compared_plugins']) or '(nothing)'}",
        f"in both      {', '.join(proof['plugins_of_both'])}",
        f"plan digest  {content['plan']}",
        f"valid for    {content['valid_for'][:16]}",
    ]
    rows = [
        (quantity, str(each["values"]), f"{each['worst']:.1e}", f"{each['bound']:.0e}", each["where"])
        for quantity, each in content["compared"].items()
    ]
    text = "\n".join(lines)
    if rows:
        text += "\n\n" + columns(("quantity", "values", "worst", "bound", "where"), rows)
    if report.not_covered:
        text += "\n\nnot covered\n" + "\n".join(f"- {each}" for each in report.not_covered)
    return text
