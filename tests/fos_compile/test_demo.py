"""The demo's parts: text, batches, measured memory, files; and, slowly, the whole of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from fos_compile.demo.memory import SavedTensors, quantized_modules, weight_bytes
from fos_compile.demo.model import WORKLOADS, build_model
from fos_compile.demo.results import Row, plot_losses, smoothed, write_json
from fos_compile.demo.run import run_demo
from fos_compile.demo.text import heldout_batches, load_corpus, train_batches
from fos_compile.demo.training import TrainingRun
from fos_compile.passes.report import Report, SiteReport

TINY = dataclasses.replace(WORKLOADS["cpu"], hidden=64, layers=1, heads=1, ffn=128)


def site(path: str, role: str, reason_code: str = "") -> SiteReport:
    return SiteReport(
        path=path,
        role=role,
        shape="1 x 1 x 1",
        a="-",
        b="-",
        implementation="",
        reason_code=reason_code,
        reason=reason_code,
        flops=None,
        bytes_saved=0,
    )


def make_sources(root: Path, files: int) -> None:
    for index in range(files):
        (root / f"module_{index:03}.py").write_bytes(b"%d" % (index % 10) * 50_000)


def test_corpus_splits_by_file_and_skips_what_is_not_the_library(tmp_path: Path) -> None:
    make_sources(tmp_path, 40)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_bytes(b"x" * 50_000)
    corpus = load_corpus(tmp_path)
    assert corpus.num_files == 40
    assert len(corpus.train) + len(corpus.heldout) == 40 * 50_000 + 40 - 2  # joined by newlines
    assert ord("x") not in corpus.train.unique() and ord("x") not in corpus.heldout.unique()


def test_corpus_too_small_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    make_sources(tmp_path, 3)
    with pytest.raises(RuntimeError, match=r"at least 1048576 bytes.*unpacked standard library"):
        load_corpus(tmp_path)


def test_batches_depend_on_the_seed_alone() -> None:
    text = torch.arange(1000).to(torch.uint8)
    size = {"batch": 4, "seq": 32, "steps": 3}
    first = list(train_batches(text, **size, seed=1))
    assert len(first) == 3 and first[0].shape == (4, 32) and first[0].dtype == torch.int64
    assert all(map(torch.equal, first, train_batches(text, **size, seed=1)))
    assert not torch.equal(first[0], next(train_batches(text, **size, seed=2)))


def test_heldout_batches_reach_both_ends() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    batches = list(heldout_batches(text, batch=4, seq=10, num_batches=5))
    assert [batch.shape for batch in batches] == [(4, 10)] * 5
    assert batches[0][0, 0] == 0 and batches[-1][-1, -1] == 199


def test_weights_are_the_same_for_the_same_seed() -> None:
    cpu = torch.device("cpu")
    first, again, other = (build_model(TINY, device=cpu, seed=seed) for seed in (3, 3, 4))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("missing", ["transformers", "another"])
def test_only_what_is_not_installed_is_reported_as_missing(missing, monkeypatch) -> None:
    """An error inside of an installed package is its own."""

    class Blocked:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "transformers":
                raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocked(), *sys.meta_path])
    with pytest.raises(
        Exception, match="must be installed" if missing == "transformers" else "another"
    ):
        build_model(TINY, device=torch.device("meta"), seed=0)


class TwoLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(32, 128))
        self.down = torch.nn.Parameter(torch.randn(128, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x @ self.up).sin() @ self.down).sum()


def observe(loss_of: object, model: torch.nn.Module, saved: SavedTensors) -> int:
    x = torch.randn(64, 32)
    saved.arm(model, [x])
    loss = loss_of(x)
    saved.observe(loss)
    loss.backward()
    return saved.num_bytes


def test_saved_bytes_in_eager_mode() -> None:
    model = TwoLayers()
    # sin keeps its input, the second product keeps sin's output; x and the weights do not count.
    assert observe(model, model, SavedTensors()) == 2 * 64 * 128 * 4


def test_saved_bytes_of_a_compiled_forward() -> None:
    """Against the outputs of the partitioned forward graph that are neither result nor input."""
    expected = []

    def forward(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        (output,) = graph.graph.find_nodes(op="output")
        saved = [node for node in output.args[0][1:] if node.op != "placeholder"]
        expected.append(sum(node.meta["val"].nbytes for node in saved))
        return graph

    model = TwoLayers()
    backend = aot_autograd(fw_compiler=forward, bw_compiler=lambda graph, _inputs: graph)
    measured = observe(torch.compile(model, backend=backend), model, SavedTensors())
    assert measured == expected[0] > 0


def test_saved_bytes_of_plain_inductor_inside_a_compiled_step() -> None:
    model, saved = TwoLayers(), SavedTensors()
    x = torch.randn(64, 32)

    @torch.compile
    def step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x)
        saved.observe(loss)
        loss.backward()
        return loss.detach()

    saved.arm(model, [x])
    step(x)
    measured = saved.num_bytes
    # Both of eager mode's tensors, or one of them where the backward recomputes the sine.
    assert measured in (64 * 128 * 4, 2 * 64 * 128 * 4)
    assert model.up.grad is not None
    saved.arm(model, [x])
    step(x)
    assert saved.num_bytes == measured


def test_weight_bytes_count_codes_scales_and_amax() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(100, 40), "b": torch.nn.Linear(64, 64)})
    everything = 2 * (100 * 40 + 40 + 64 * 64 + 64)
    assert weight_bytes(model) == everything
    packed = 40 * 64 + 128 * 128 // 16 + 4  # 100 columns are padded to 128, 40 scale rows to 128
    assert weight_bytes(model, {"a"}) == everything - 2 * 100 * 40 + packed


def test_quantized_modules_are_the_forward_sites() -> None:
    sites = (site("a", "fprop"), site("b", "wgrad"), site("c", "fprop", reason_code="skip"))
    assert quantized_modules(Report(recipe="training", sites=sites)) == {"a"}
    assert quantized_modules(None) == set()


def test_smoothing_is_a_trailing_mean() -> None:
    assert smoothed([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]


def test_plot_and_json_are_written(tmp_path: Path) -> None:
    def run(recipe: str, losses: list[float]) -> TrainingRun:
        return TrainingRun(
            recipe=recipe, seed=0, losses=losses, setup_s=1.0, step_ms=1.0, saved_bytes=1
        )

    runs = {"bf16": [run("bf16", [3.0, 2.0])], "NVFP4": [run("nvfp4", [3.0, 2.1])]}
    plot_losses(tmp_path / "loss.png", runs, baseline="bf16")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    row = Row(
        name="bf16",
        recipe="bf16",
        train_loss=1.0,
        heldout=2.0,
        gap=None,
        weight_bytes=3,
        saved_bytes=4,
    )
    write_json(tmp_path / "results.json", {"seed": 0}, {"training": [row]})
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["seed"] == 0 and written["training"][0]["heldout"] == 2.0


@pytest.mark.slow
def test_demo_from_start_to_end(tmp_path: Path) -> None:
    tables = run_demo(tmp_path, device="cpu", steps=6)
    assert (tmp_path / "loss.png").exists()
    training = {row.recipe: row for row in tables["training"]}
    assert set(training) == {"bf16", "nvfp4", "training"}
    for recipe in ("nvfp4", "training"):
        assert training[recipe].weight_bytes < training["bf16"].weight_bytes
        assert training[recipe].saved_bytes < training["bf16"].saved_bytes
    written = json.loads((tmp_path / "results.json").read_text())
    losses = written["losses_nats"]["4/6"]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert len(tables["inference"]) == 3
