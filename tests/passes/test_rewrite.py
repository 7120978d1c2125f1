"""Goldens of the rewritten graph, one per rule. ``EXPECTTEST_ACCEPT=1`` rewrites them."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from graphs import Captured, config, text
from models import MLP, Experts, SwiGLU, bf16, tokens_of
from torch import nn

from fos_compile.passes.pipeline import rewrite
from fos_compile.passes.recipe import OperandSpec, Recipe


def rewritten(captured: Captured, **options) -> str:
    rewrite(captured.graph, config(**options))
    captured.graph.lint()
    return text(captured.graph)


def inference(model, *inputs, **options) -> str:
    with torch.no_grad():
        captured = Captured(model, *inputs)
    return rewritten(captured, **{"recipe": "inference", **options})


def linear(**options):
    return bf16(nn.Linear(64, 128, **{"bias": False, **options}))


def test_insert_one_linear_layer():
    assert_expected_inline(
        inference(linear(), tokens_of()),
        """\
arg0_1: bfloat16[128, 64] parameter
arg1_1: bfloat16[2, 16, 64]
permute = aten.permute(arg0_1, [1, 0])
view = aten.view(arg1_1, [32, 64])
amax_default = fos.amax(view, False, False)
quantize_default = fos.quantize(view, amax_default, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='1d', rht=False, transpose=False, stream=0)
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
amax_default_1 = fos.amax(arg0_1, False, False)
quantize_default_1 = fos.quantize(arg0_1, amax_default_1, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='1d', rht=False, transpose=False, stream=2)
getitem_2 = getitem(quantize_default_1, 0)
getitem_3 = getitem(quantize_default_1, 1)
scaled_mm_default = fos.scaled_mm(getitem, getitem_1, amax_default, 1536.0, getitem_2, getitem_3, amax_default_1, 1536.0, None, format='nvfp4', m=32, n=128, k=64, out_dtype=torch.bfloat16)
view_1 = aten.view(scaled_mm_default, [2, 16, 128])
return (view_1,)""",
    )


def test_insert_fuses_a_bias_vector():
    graph = inference(linear(bias=True), tokens_of())
    assert_expected_inline(
        graph.splitlines()[-3],
        """scaled_mm_default = fos.scaled_mm(getitem, getitem_1, amax_default, 1536.0, getitem_2, getitem_3, amax_default_1, 1536.0, arg1_1, format='nvfp4', m=32, n=128, k=64, out_dtype=torch.bfloat16)""",
    )


def test_insert_adds_what_is_no_bias_vector():
    def scaled(x, w, c):
        return torch.addmm(c, x, w, alpha=2, beta=3)

    inputs = [torch.zeros(*s, dtype=torch.bfloat16) for s in ((64, 64), (64, 128), (64, 128))]
    graph = inference(scaled, *inputs)
    assert_expected_inline(
        "\n".join(graph.splitlines()[-7:]),
        """\
scaled_mm_default = fos.scaled_mm(getitem, getitem_1, amax_default, 1536.0, getitem_2, getitem_3, amax_default_1, 1536.0, None, format='nvfp4', m=64, n=128, k=64, out_dtype=torch.float32)
convert_element_type_default = prims.convert_element_type(arg0_1, torch.float32)
mul_tensor = aten.mul(convert_element_type_default, 3)
mul_tensor_1 = aten.mul(scaled_mm_default, 2)
add_tensor = aten.add(mul_tensor_1, mul_tensor)
convert_element_type_default_1 = prims.convert_element_type(add_tensor, torch.bfloat16)
return (convert_element_type_default_1,)""",
    )


def test_insert_batched_experts():
    x = torch.zeros(2, 16, 64, dtype=torch.bfloat16)
    assert_expected_inline(
        inference(bf16(Experts()), x),
        """\
arg0_1: bfloat16[2, 64, 128] parameter
arg1_1: bfloat16[2, 16, 64]
amax_default = fos.amax(arg1_1, False, False)
quantize_default = fos.quantize(arg1_1, amax_default, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='1d', rht=False, transpose=False, stream=0)
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
amax_default_1 = fos.amax(arg0_1, False, False)
quantize_default_1 = fos.quantize(arg0_1, amax_default_1, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='1d', rht=False, transpose=True, stream=3)
getitem_2 = getitem(quantize_default_1, 0)
getitem_3 = getitem(quantize_default_1, 1)
scaled_mm_default = fos.scaled_mm(getitem, getitem_1, amax_default, 1536.0, getitem_2, getitem_3, amax_default_1, 1536.0, None, format='nvfp4', m=16, n=128, k=64, out_dtype=torch.bfloat16)
return (scaled_mm_default,)""",
    )


def test_insert_weight_only_keeps_the_matmul():
    assert_expected_inline(
        inference(linear(), tokens_of(), recipe="weight_only"),
        """\
arg0_1: bfloat16[128, 64] parameter
arg1_1: bfloat16[2, 16, 64]
permute = aten.permute(arg0_1, [1, 0])
view = aten.view(arg1_1, [32, 64])
amax_default = fos.amax(arg0_1, False, False)
quantize_default = fos.quantize(arg0_1, amax_default, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='1d', rht=False, transpose=False, stream=0)
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
dequantize_default = fos.dequantize(getitem, getitem_1, amax_default, 128, 64, format='nvfp4', qs=1536.0, dtype=torch.bfloat16)
permute_default = aten.permute(dequantize_default, [1, 0])
mm_default = aten.mm(view, permute_default)
view_1 = aten.view(mm_default, [2, 16, 128])
return (view_1,)""",
    )


def test_insert_mxfp4_takes_one_for_amax():
    spec = OperandSpec(format="mxfp4", scale_rule="static_6")
    recipe = Recipe(name="mx", fprop_activation=spec, fprop_weight=spec)
    assert_expected_inline(
        inference(linear(), tokens_of(), recipe=recipe),
        """\
arg0_1: bfloat16[128, 64] parameter
arg1_1: bfloat16[2, 16, 64]
permute = aten.permute(arg0_1, [1, 0])
view = aten.view(arg1_1, [32, 64])
full_default = aten.full([], 1.0, dtype=torch.float32, device=device(type='cpu'))
quantize_default = fos.quantize(view, full_default, None, format='mxfp4', scale_rule='static_6', rounding='nearest', block='1d', rht=False, transpose=False, stream=0)
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
full_default_1 = aten.full([], 1.0, dtype=torch.float32, device=device(type='cpu'))
quantize_default_1 = fos.quantize(arg0_1, full_default_1, None, format='mxfp4', scale_rule='static_6', rounding='nearest', block='1d', rht=False, transpose=False, stream=2)
getitem_2 = getitem(quantize_default_1, 0)
getitem_3 = getitem(quantize_default_1, 1)
scaled_mm_default = fos.scaled_mm(getitem, getitem_1, full_default, 1.0, getitem_2, getitem_3, full_default_1, 1.0, None, format='mxfp4', m=32, n=128, k=64, out_dtype=torch.bfloat16)
view_1 = aten.view(scaled_mm_default, [2, 16, 128])
return (view_1,)""",
    )


def test_insert_symbolic_sizes():
    x = tokens_of()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        captured = Captured(linear(), x, dynamic=None)
    assert_expected_inline(
        rewritten(captured, recipe="inference"),
        """\
arg0_1: bfloat16[128, 64] parameter
arg1_1: int
arg2_1: int
arg3_1: bfloat16[s33, s50, 64]
permute = aten.permute(arg0_1, [1, 0])
mul = <built-in function mul>(arg1_1, arg2_1)
view = aten.view(arg3_1, [mul, 64])
sym_size_int_4 = aten.sym_size(view, 0)
amax_default = fos.amax(view, False, False)
quantize_default = fos.quantize(view, amax_default, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='1d', rht=False, transpose=False, stream=0)
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
amax_default_1 = fos.amax(arg0_1, False, False)
quantize_default_1 = fos.quantize(arg0_1, amax_default_1, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='1d', rht=False, transpose=False, stream=2)
getitem_2 = getitem(quantize_default_1, 0)
getitem_3 = getitem(quantize_default_1, 1)
scaled_mm_default = fos.scaled_mm(getitem, getitem_1, amax_default, 1536.0, getitem_2, getitem_3, amax_default_1, 1536.0, None, format='nvfp4', m=sym_size_int_4, n=128, k=64, out_dtype=torch.bfloat16)
view_1 = aten.view(scaled_mm_default, [arg1_1, arg2_1, 128])
return (view_1,)""",
    )


def test_share_one_quantization_for_gate_and_up():
    assert_expected_inline(
        inference(bf16(SwiGLU()), tokens_of()),
        """\
arg0_1: bfloat16[128, 64] parameter
arg1_1: bfloat16[2, 16, 64]
arg2_1: bfloat16[128, 64] parameter
arg3_1: bfloat16[64, 128] parameter
permute = aten.permute(arg0_1, [1, 0])
view = aten.view(arg1_1, [32, 64])
amax_default = fos.amax(view, False, False)
quantize_default = fos.quantize(view, amax_default, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='1d', rht=False, transpose=False, stream=0)
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
amax_default_1 = fos.amax(arg0_1, False, False)
quantize_default_1 = fos.quantize(arg0_1, amax_default_1, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='1d', rht=False, transpose=False, stream=2)
getitem_2 = getitem(quantize_default_1, 0)
getitem_3 = getitem(quantize_default_1, 1)
scaled_mm_default = fos.scaled_mm(getitem, getitem_1, amax_default, 1536.0, getitem_2, getitem_3, amax_default_1, 1536.0, None, format='nvfp4', m=32, n=128, k=64, out_dtype=torch.bfloat16)
view_1 = aten.view(scaled_mm_default, [2, 16, 128])
convert_element_type_2 = prims.convert_element_type(view_1, torch.float32)
neg = aten.neg(convert_element_type_2)
exp = aten.exp(neg)
add = aten.add(exp, 1)
div = aten.div(convert_element_type_2, add)
convert_element_type_3 = prims.convert_element_type(div, torch.bfloat16)
permute_1 = aten.permute(arg2_1, [1, 0])
view_2 = aten.view(arg1_1, [32, 64])
amax_default_3 = fos.amax(arg2_1, False, False)
quantize_default_3 = fos.quantize(arg2_1, amax_default_3, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='1d', rht=False, transpose=False, stream=4)
getitem_6 = getitem(quantize_default_3, 0)
getitem_7 = getitem(quantize_default_3, 1)
scaled_mm_default_1 = fos.scaled_mm(getitem, getitem_1, amax_default, 1536.0, getitem_6, getitem_7, amax_default_3, 1536.0, None, format='nvfp4', m=32, n=128, k=64, out_dtype=torch.bfloat16)
view_3 = aten.view(scaled_mm_default_1, [2, 16, 128])
mul = aten.mul(convert_element_type_3, view_3)
permute_2 = aten.permute(arg3_1, [1, 0])
view_4 = aten.view(mul, [32, 128])
amax_default_4 = fos.amax(view_4, False, False)
quantize_default_4 = fos.quantize(view_4, amax_default_4, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='1d', rht=False, transpose=False, stream=6)
getitem_8 = getitem(quantize_default_4, 0)
getitem_9 = getitem(quantize_default_4, 1)
amax_default_5 = fos.amax(arg3_1, False, False)
quantize_default_5 = fos.quantize(arg3_1, amax_default_5, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='1d', rht=False, transpose=False, stream=8)
getitem_10 = getitem(quantize_default_5, 0)
getitem_11 = getitem(quantize_default_5, 1)
scaled_mm_default_2 = fos.scaled_mm(getitem_8, getitem_9, amax_default_4, 1536.0, getitem_10, getitem_11, amax_default_5, 1536.0, None, format='nvfp4', m=32, n=64, k=128, out_dtype=torch.bfloat16)
view_5 = aten.view(scaled_mm_default_2, [2, 16, 64])
return (view_5,)""",
    )


def test_share_pairs_forward_and_backward():
    captured = Captured(linear(), tokens_of().requires_grad_())
    assert_expected_inline(
        rewritten(captured, recipe="training"),
        """\
primals_1: bfloat16[128, 64] parameter
primals_2: bfloat16[2, 16, 64]
tangents_1: bfloat16[2, 16, 128]
seed_default = fos.seed(device=device(type='cpu'))
permute = aten.permute(primals_1, [1, 0])
view = aten.view(primals_2, [32, 64])
amax_default_3 = fos.amax(view, True, True)
amax_default = fos.amax(view, False, False)
quantize_pair_default = fos.quantize_pair(view, amax_default, amax_default_3, None, format='nvfp4', scale_rule='mse', rounding_row='nearest', rounding_col='nearest', block='1d', rht_row=False, rht_col=True, stream=0)
getitem_6 = getitem(quantize_pair_default, 2)
getitem_7 = getitem(quantize_pair_default, 3)
getitem = getitem(quantize_pair_default, 0)
getitem_1 = getitem(quantize_pair_default, 1)
amax_default_1 = fos.amax(primals_1, False, False)
quantize_default_1 = fos.quantize(primals_1, amax_default_1, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='2d', rht=False, transpose=False, stream=2)
getitem_2 = getitem(quantize_default_1, 0)
getitem_3 = getitem(quantize_default_1, 1)
scaled_mm_default = fos.scaled_mm(getitem, getitem_1, amax_default, 1536.0, getitem_2, getitem_3, amax_default_1, 1536.0, None, format='nvfp4', m=32, n=128, k=64, out_dtype=torch.bfloat16)
view_1 = aten.view(scaled_mm_default, [2, 16, 128])
view_2 = aten.view(tangents_1, [32, 128])
amax_default_4 = fos.amax(view_2, False, False)
amax_default_2 = fos.amax(view_2, True, True)
quantize_pair_default_1 = fos.quantize_pair(view_2, amax_default_4, amax_default_2, seed_default, format='nvfp4', scale_rule='mse', rounding_row='stochastic', rounding_col='stochastic', block='1d', rht_row=False, rht_col=True, stream=4)
getitem_8 = getitem(quantize_pair_default_1, 0)
getitem_9 = getitem(quantize_pair_default_1, 1)
getitem_4 = getitem(quantize_pair_default_1, 2)
getitem_5 = getitem(quantize_pair_default_1, 3)
permute_1 = aten.permute(view_2, [1, 0])
scaled_mm_default_1 = fos.scaled_mm(getitem_4, getitem_5, amax_default_2, 1536.0, getitem_6, getitem_7, amax_default_3, 1536.0, None, format='nvfp4', m=128, n=64, k=32, out_dtype=torch.bfloat16)
permute_2 = aten.permute(scaled_mm_default_1, [1, 0])
permute_3 = aten.permute(permute, [1, 0])
quantize_default_5 = fos.quantize(primals_1, amax_default_1, None, format='nvfp4', scale_rule='mse', rounding='nearest', block='2d', rht=False, transpose=True, stream=3)
getitem_10 = getitem(quantize_default_5, 0)
getitem_11 = getitem(quantize_default_5, 1)
scaled_mm_default_2 = fos.scaled_mm(getitem_8, getitem_9, amax_default_4, 1536.0, getitem_10, getitem_11, amax_default_1, 1536.0, None, format='nvfp4', m=32, n=64, k=128, out_dtype=torch.bfloat16)
view_3 = aten.view(scaled_mm_default_2, [2, 16, 64])
permute_4 = aten.permute(permute_2, [1, 0])
return [view_1, permute_4, view_3]""",
    )


def test_share_saves_packed_weights_on_request():
    captured = Captured(linear(), tokens_of().requires_grad_())
    graph = rewritten(captured, recipe="training", save_packed_weights=True)
    pairs = [line for line in graph.splitlines() if "quantize_pair(" in line]
    assert len(pairs) == 3
    assert any("block='2d'" in pair for pair in pairs)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_share_pairs_views_that_siblings_made(format):
    """The frozen layer's rows come first; the other's columns read a view that is made later."""
    rows = OperandSpec(format=format, scale_rule="static_6")
    columns = OperandSpec(format=format, scale_rule="static_6", rht=True)
    recipe = Recipe(
        name="r", fprop_activation=rows, fprop_weight=rows, wgrad_gradient=columns,
        wgrad_activation=columns,
    )  # fmt: skip
    frozen, trained = linear(), linear()
    frozen.weight.requires_grad_(False)
    captured = Captured(lambda x: frozen(x) + trained(x), tokens_of())
    graph = rewritten(captured, recipe=recipe)
    pairs = [line for line in graph.splitlines() if "fos.quantize_pair(" in line]
    assert len(pairs) == 1 and "quantize_pair(view, " in pairs[0]


def test_tied_weights_are_quantized_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 64, bias=False)
            self.second = nn.Linear(64, 64, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    graph = inference(bf16(Tied()), tokens_of())
    assert graph.count("fos.quantize(") == 3
    assert graph.count("fos.scaled_mm(") == 2


def test_a_graph_without_plans_stays_as_it_was():
    captured = Captured(bf16(MLP()), tokens_of())
    before = text(captured.graph)
    assert rewritten(captured, recipe="bf16") == before


def test_checkpointed_activations_are_recomputed_not_saved():
    from torch.utils.checkpoint import checkpoint

    model = bf16(MLP())
    captured = Captured(
        lambda x: checkpoint(model, x, use_reentrant=False), tokens_of().requires_grad_()
    )
    rewrite(captured.graph, config(recipe="training"))
    forward = [
        n
        for n in captured.graph.nodes
        if "quantize" in str(n.target) and n.meta.get("partitioner_tag") == "is_forward"
    ]
    assert forward
    assert all("recompute" in n.meta for n in forward)


def test_streams_are_unique():
    captured = Captured(bf16(SwiGLU()), tokens_of().requires_grad_())
    rewrite(captured.graph, config(recipe="training"))
    streams = []
    for node in captured.graph.nodes:
        if node.target is torch.ops.fos.quantize_pair.default:
            streams += [node.kwargs["stream"], node.kwargs["stream"] + 1]
        elif node.target is torch.ops.fos.quantize.default:
            streams.append(node.kwargs["stream"])
    assert len(streams) == len(set(streams)) > 6


def test_one_seed_a_graph():
    captured = Captured(bf16(SwiGLU()), tokens_of().requires_grad_())
    graph = rewritten(captured, recipe="training")
    assert graph.count("fos.seed(") == 1


def test_a_product_may_be_the_operand_of_another():
    model = bf16(nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)))
    graph = rewritten(Captured(model, tokens_of().requires_grad_()), recipe="training")
    assert graph.count("fos.scaled_mm(") == 6 and "aten.mm" not in graph


def test_quantizations_of_the_user_stay():
    from fos_compile import quantize

    layer = linear()
    graph = inference(lambda x: (quantize(x, "mae").values, layer(x)), tokens_of())
    assert graph.count("scale_rule='mae'") == 1 and graph.count("fos.scaled_mm(") == 1
