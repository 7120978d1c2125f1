from __future__ import annotations

import torch
from graphs import Captured
from models import tokens_of

from fos_compile.passes.graph_edit import size

aten = torch.ops.aten


def test_a_size_is_taken_where_it_is_needed():
    """An existing sym_size node serves what follows it, and nothing before."""
    x = tokens_of()
    torch._dynamo.mark_dynamic(x, 1)
    graph = Captured(lambda x: x.relu().exp(), x, dynamic=None).graph
    relu, exp = (
        next(n for n in graph.nodes if n.target is t.default) for t in (aten.relu, aten.exp)
    )
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        late = graph.call_function(aten.sym_size.int, (relu, 1))
    assert size(graph, relu, 1, before=output) is late
    early = size(graph, relu, -2, before=exp)
    assert early is not late and relu < early < exp
    assert size(graph, relu, 1, before=exp) is early
    assert size(graph, relu, 2, before=exp) == 64
