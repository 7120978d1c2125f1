"""How many bytes do our graphs keep for the backward, next to plain Inductor in bf16?

Counts what the partitioner makes the forward graph return for the backward: every storage once,
neither parameters nor other graph inputs; packed weights, scales and amax scalars count. Nothing is
compiled for that. With --run both are compiled too and autograd's own references are added up.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

import harness
import workloads
from fos_compile.backend import fouroversix
from fos_compile.demo.memory import SavedTensors

OURS: Mapping[str, Any] = {"recipe": "training", "strict": True}
MIB = 1 << 20
NOTES = """\
MiB; ratio = ours / bf16. The run columns are what autograd holds after the compiled forward, an
independent count. The pre-norm residual MLP is the one whose ratio is required; without norm and
residual the bf16 graph keeps its first activation as a graph input, which is not counted, where
ours keeps a packed copy, which is: with_inputs counts both. Below: every saved tensor, equal ones
on one line; the CSV has them one by one."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """One tensor that a forward graph keeps, as a line of the list."""

    name: str
    made_by: str
    module: str
    shape: str
    dtype: str
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ListRow:
    """One line of the CSV: a saved tensor and whose it is."""

    model: str
    compiler: str
    name: str
    made_by: str
    module: str
    shape: str
    dtype: str
    bytes: int

    @classmethod
    def of(cls, model: str, compiler: str, saved: Saved) -> ListRow:
        """Return the line of `saved`."""
        return cls(model=model, compiler=compiler, **dataclasses.asdict(saved))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Saved tensors of one kind, a line of the printed list."""

    count: int
    made_by: str
    shape: str
    dtype: str
    mib: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One model: MiB saved by plain Inductor in bf16 and by us, and their ratio.

    Attributes:
        bound: what the ratio is required not to exceed; None where the model is shown for context.
        with_inputs: the ratio when graph inputs that are saved (not parameters) count too.
        bf16_run_mib: what autograd holds after a compiled forward; None without --run.
    """

    model: str
    bf16_mib: float
    ours_mib: float
    ratio: float
    bound: float | None
    holds: bool | None
    with_inputs: float
    bf16_run_mib: float | None
    ours_run_mib: float | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model with its input and the function from both to what is differentiated."""

    name: str
    make: Callable[[torch.device], tuple[nn.Module, torch.Tensor]]
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    bound: float | None


def mlp_case(name: str, *, width: int, tokens: int, norm: bool, bound: float | None) -> Case:
    """Return two SwiGLU blocks in bf16 whose input needs a gradient, as inside a model."""

    def make(device: torch.device) -> tuple[nn.Module, torch.Tensor]:
        model = workloads.swiglu_mlp(width, norm=norm).to(device, torch.bfloat16)
        return model, torch.randn(tokens, width, device=device).bfloat16().requires_grad_()

    return Case(name=name, make=make, call=lambda model, x: model(x), bound=bound)


def llama_case(
    name: str,
    *,
    hidden: int,
    layers: int,
    seq: int,
    batch: int,
    autocast: bool,
    bound: float | None,
    vocabulary: int = 4096,
) -> Case:
    """Return a Llama with heads of 64 and its loss, in pure bf16 or in fp32 under autocast."""

    def make(device: torch.device) -> tuple[nn.Module, torch.Tensor]:
        model = workloads.llama(
            hidden=hidden,
            layers=layers,
            heads=hidden // 64,
            ffn=3 * hidden,
            vocabulary=vocabulary,
            seq=seq,
        )
        if not autocast:
            model = model.bfloat16()
        return model.to(device), torch.randint(vocabulary, (batch, seq), device=device)

    loss = workloads.llama_loss
    call = workloads.under_autocast(loss) if autocast else loss
    return Case(name=name, make=make, call=call, bound=bound)


def cases(*, quick: bool = False) -> list[Case]:
    """Return the models of the statement; `quick` is the same architectures, smaller."""
    width, tokens = (256, 512) if quick else (1024, 2048)
    size = {"hidden": 512, "layers": 4, "seq": 512, "batch": 4}
    if quick:
        size = {"hidden": 256, "layers": 2, "seq": 256, "batch": 2, "vocabulary": 1024}
    mlp = f"SwiGLU MLP, 2 blocks, D={width}, 4x up, {tokens} tokens"
    of = "Llama, {layers} layers, hidden {hidden}, {batch} x {seq} tokens".format(**size)
    return [
        mlp_case(f"{mlp}, pre-norm residual", width=width, tokens=tokens, norm=True, bound=0.75),
        mlp_case(f"{mlp}, no norm", width=width, tokens=tokens, norm=False, bound=None),
        llama_case(f"{of}, bf16", autocast=False, bound=0.85, **size),
        llama_case(f"{of}, autocast", autocast=True, bound=0.85, **size),
    ]


def parameters(model: nn.Module) -> set[tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of every parameter and buffer, by which a graph's inputs are told."""
    return {(each.shape, each.dtype) for each in (*model.parameters(), *model.buffers())}


def saved_tensors(
    forward: fx.GraphModule,
    num_outputs: int,
    known: Collection[tuple[torch.Size, torch.dtype]] = (),
) -> tuple[list[Saved], int]:
    """Return what `forward` saves, largest first, and the bytes of saved inputs not in `known`.

    Views count as the tensor behind them; a parameter or input is no activation, whatever its view.
    """
    outputs: Any = forward.graph.output_node().args[0]
    bases = [base for base in dict.fromkeys(map(_base, outputs[num_outputs:])) if _is_tensor(base)]
    inputs = sum(
        _nbytes(base)
        for base in bases
        if base.op == "placeholder"
        and (base.meta["val"].shape, base.meta["val"].dtype) not in known
    )
    saved = [
        Saved(
            name=node.name,
            made_by=_maker(node),
            module=_module(node),
            shape="x".join(map(str, node.meta["val"].shape)) or "scalar",
            dtype=str(node.meta["val"].dtype).removeprefix("torch."),
            bytes=_nbytes(node),
        )
        for node in bases
        if node.op != "placeholder"
    ]
    return sorted(saved, key=lambda each: -each.bytes), inputs


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


def _base(node: fx.Node) -> fx.Node:
    """The node whose storage `node` shows: behind every operator that returns a view."""
    while isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        alias = schema.arguments[0].alias_info if schema.arguments else None
        if alias is None or alias.is_write:
            break
        viewed: Any = node.args[0]
        node = viewed
    return node


def _maker(node: fx.Node) -> str:
    source: Any = node.args[0] if node.target is operator.getitem else node
    return str(source.target).removesuffix(".default")


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    last = list(stack.values())[-1][0] if stack else ""
    names = re.findall(r"(?<=\[')[^']+|(?<=\.)[A-Za-z]\w*", last)
    return ".".join(name for name in names if name not in ("_modules", "model"))


def _nbytes(node: fx.Node) -> int:
    return node.meta["val"].untyped_storage().nbytes()


def at_runtime(case: Case, device: torch.device, **compile_options: Any) -> int:
    """Return the bytes that autograd holds between the compiled forward and its backward."""
    torch.compiler.reset()
    model, x = case.make(device)
    held = SavedTensors()
    held.arm(model, [x])
    compiled = torch.compile(case.call, dynamic=False, fullgraph=True, **compile_options)
    held.observe(compiled(model, x))
    return held.num_bytes


def saved_by(
    case: Case, device: torch.device
) -> tuple[dict[str, list[Saved]], dict[str, int], dict[str, int]]:
    """Return for `bf16` and `ours`: the list of saved tensors, its bytes, bytes of saved inputs."""
    model, x = case.make(device)
    lists, inputs = {}, {}
    for name, backend, options in (("bf16", "inductor", None), ("ours", fouroversix, OURS)):
        forward, _, num_outputs = workloads.partitioned(
            case.call, model, x, backend=backend, options=options
        )
        lists[name], inputs[name] = saved_tensors(forward, num_outputs, parameters(model))
    return lists, {name: sum(each.bytes for each in saved) for name, saved in lists.items()}, inputs


def run(case: Case, device: torch.device, *, compiled: bool) -> tuple[Row, dict[str, list[Saved]]]:
    """Measure one model under both compilers."""
    lists, totals, inputs = saved_by(case, device)
    ratio = totals["ours"] / totals["bf16"]
    ours = {"backend": fouroversix, "options": dict(OURS)}
    row = Row(
        model=case.name,
        bf16_mib=totals["bf16"] / MIB,
        ours_mib=totals["ours"] / MIB,
        ratio=ratio,
        bound=case.bound,
        holds=None if case.bound is None else ratio <= case.bound,
        with_inputs=(totals["ours"] + inputs["ours"]) / (totals["bf16"] + inputs["bf16"]),
        bf16_run_mib=at_runtime(case, device) / MIB if compiled else None,
        ours_run_mib=at_runtime(case, device, **ours) / MIB if compiled else None,
    )
    return row, lists


def main() -> None:
    """Print the tables and write them."""
    made = harness.parser(__doc__, name="activation_memory")
    made.add_argument("--quick", action="store_true", help="the same architectures, smaller")
    made.add_argument("--run", action="store_true", help="compile and run too, and count there")
    options = made.parse_args()
    rows, lines = [], []
    for case in cases(quick=options.quick):
        row, lists = run(case, options.device, compiled=options.run)
        rows.append(row)
        lines += [ListRow.of(case.name, kind, each) for kind in lists for each in lists[kind]]
    harness.write_results(
        rows,
        title="Tensors saved for the backward: plain Inductor in bf16 and recipe training",
        facts=harness.header(options.device, with_roof=False),
        md=options.md,
        notes=NOTES + "\n\n" + largest(lines),
    )
    harness.write_csv(options.csv, lines)


def largest(lines: Sequence[ListRow]) -> str:
    """Return the lists as markdown, equal tensors of equal makers on one line."""
    text = []
    for model, compiler in dict.fromkeys((each.model, each.compiler) for each in lines):
        part = [each for each in lines if (each.model, each.compiler) == (model, compiler)]
        groups = collections.Counter((each.made_by, each.shape, each.dtype) for each in part)
        size = {(each.made_by, each.shape, each.dtype): each.bytes for each in part}
        table = [
            Group(count=num, made_by=key[0], shape=key[1], dtype=key[2], mib=num * size[key] / MIB)
            for key, num in groups.items()
        ]
        table.sort(key=lambda group: -group.mib)
        text += [f"## {model}: {compiler}", "", harness.markdown_table(table), ""]
    return "\n".join(text).rstrip()


if __name__ == "__main__":
    main()
