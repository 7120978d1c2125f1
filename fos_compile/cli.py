"""The command line: `python -m fos_compile COMMAND`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

_PACKAGE = Path(__file__).resolve().parent
_EXAMPLE = "fos_compile.demo.model:example"

app = typer.Typer(
    name="fos-compile", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def _main() -> None:
    """Four Over Six NVFP4 training and inference for any model that torch.compile can trace."""
    sys.path[:] = [entry for entry in sys.path if not _shadows(entry)]


def _shadows(entry: str) -> bool:
    """Whether an entry of sys.path is our checkout.

    Its kernels/ would pose as the Hugging Face package of that name, which transformers imports;
    ``python -m`` puts the current folder first. Our own packages are found without it.
    """
    is_checkout = not (_PACKAGE / "kernels").exists()
    return is_checkout and Path(entry).resolve() == _PACKAGE.parent


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

    _check_device(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out must be a folder, got {str(out)!r}: {error}") from error
    run_demo(out, device=device, steps=steps, seed=seed)


def _check_device(device: str | None) -> None:
    import torch

    count = torch.cuda.device_count()
    valid = ["cpu", *["cuda"] * (count > 0), *(f"cuda:{index}" for index in range(count))]
    if device is not None and device not in valid:
        raise typer.BadParameter(f"--device must be one of {', '.join(valid)}, got {device!r}")


@app.command()
def explain(
    target: Annotated[
        str,
        typer.Argument(
            help="MODULE:FUNCTION that returns (model, inputs); default: the demo's Llama."
        ),
    ] = _EXAMPLE,
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
    from fos_compile.config import parse_options
    from fos_compile.kernels.errors import InvalidArgument

    options = {"skip": list(skip or ()), **({} if recipe is None else {"recipe": recipe})}
    try:
        parse_options(options)
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error
    model, inputs = _load(target)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    typer.echo(str(fos_compile.explain(model, *args, options=options, **kwargs)))


def _load(target: str) -> tuple[Any, Any]:
    """Model and inputs from `target`, MODULE:FUNCTION; the user's is looked for here as well."""
    module, _, name = target.partition(":")
    if not module or not name:
        raise typer.BadParameter(f"TARGET must be MODULE:FUNCTION, got {target!r}")
    if target != _EXAMPLE and not _shadows(""):
        sys.path.append("")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"TARGET must name a function, got {target!r}: {error}") from error
    if not callable(function):
        kind = type(function).__name__
        raise typer.BadParameter(f"TARGET must name a function, got {target!r}, of type {kind}")
    made = function()
    pair = isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], (tuple, dict))
    if not pair or not callable(made[0]):
        required = "(model, inputs), the inputs a tuple or a dict"
        raise typer.BadParameter(f"{target!r} must return {required}, got {type(made).__name__}")
    return made


@app.command()
def doctor() -> None:
    """Print versions, devices, and the implementation that each operator would use."""
    from fos_compile.doctor import print_doctor

    print_doctor()


bench = typer.Typer(no_args_is_help=True, help="Measure on this machine.")
app.add_typer(bench, name="bench")


@bench.callback()
def _bench() -> None:
    """Keep `matmul` a command of its own, however many there are."""


@bench.command("matmul")
def bench_matmul(
    shapes: Annotated[
        str | None,
        typer.Option(
            help="List of MxNxK, squares, mlp, decode, quick; default: squares,mlp,decode on a GPU."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes, short samples.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if any.")] = None,
    format: Annotated[str, typer.Option(help="nvfp4 or mxfp4.")] = "nvfp4",
    model: Annotated[bool, typer.Option("--mlp/--no-mlp", help="Also train an MLP.")] = True,
    tune: Annotated[
        bool, typer.Option("--tune", help="First find the best tile of each shape, and keep it.")
    ] = False,
    md: Annotated[Path | None, typer.Option(help="File for the table.")] = None,
    csv: Annotated[Path | None, typer.Option(help="File for the numbers.")] = None,
) -> None:
    """Time every way to multiply in FP4, next to bf16, and test each against float64.

    Exits with 1 if one that says that it serves fails or disagrees.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fos_compile.bench import command
    from fos_compile.kernels.errors import InvalidArgument

    _check_device(device)
    try:
        report = command.run(
            shapes, quick=quick, device=device, format=format, model=model, tune=tune,
            md=md, csv=csv, echo=typer.echo,
        )  # fmt: skip
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(1 if report.failures else 0)
