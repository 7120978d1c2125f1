"""The command line: `python -m fos_compile COMMAND`."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="fos-compile", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def _main() -> None:
    """Four Over Six NVFP4 training and inference for any model that torch.compile can trace."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plot and the numbers.")] = Path(
        "demo-results"
    ),
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if any.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Training steps.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and rounding.")] = 0,
) -> None:
    """Train a small Llama in bf16, NVFP4 and NVFP4 with 4/6, and compare."""
    # Read when torch loads its OpenMP runtime. A thread that spins at a barrier starves the one it
    # waits for as soon as another process wants a core: 8 ms an operator instead of 0.1.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fos_compile.demo.run import run_demo

    run_demo(out, device=device, steps=steps, seed=seed)


@app.command()
def explain(
    target: Annotated[
        str,
        typer.Argument(
            help="MODULE:FUNCTION that returns (model, inputs); default: the demo's Llama."
        ),
    ] = "fos_compile.demo.model:example",
    recipe: Annotated[
        str | None,
        typer.Option(help="Default: training if the model requires gradients, else inference."),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Glob of module paths to leave alone; repeatable.")
    ] = None,
) -> None:
    """Print what happens to every matmul of a model, and why not; compiles nothing.

    FUNCTION takes no arguments. The inputs are a tuple of arguments or a dict of keyword
    arguments; model and inputs on the meta device cost no memory. To explain a transformers model:

    def build():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER))
            return model.bfloat16(), {"input_ids": torch.zeros(1, 128, dtype=torch.int64)}
    """
    import fos_compile

    model, inputs = _load(target)()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    options = {"skip": list(skip or ())}
    typer.echo(str(fos_compile.explain(model, *args, recipe=recipe, options=options, **kwargs)))


def _load(target: str) -> Any:
    """Return the object that `target`, MODULE:NAME, names; the current folder is searched too."""
    import sys

    module, colon, name = target.partition(":")
    if not colon:
        raise typer.BadParameter(f"TARGET must be MODULE:FUNCTION, got {target!r}")
    sys.path.append("")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"TARGET must name a function, got {target!r}: {error}") from error


@app.command()
def doctor() -> None:
    """Print versions, devices, and the implementation that each operator would use."""
    from fos_compile.doctor import print_doctor

    print_doctor()
