"""Models and captured graphs that more than one benchmark needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.nn import functional


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): gate and up read one activation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [.., width] for [.., width]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class PreNormBlock(nn.Module):
    """x + SwiGLU(RMSNorm(x)), as a transformer has it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.mlp = SwiGLU(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [.., width] for [.., width]."""
        return x + self.mlp(self.norm(x))


def swiglu_mlp(width: int, *, blocks: int = 2, up: int = 4, norm: bool = False) -> nn.Module:
    """Return `blocks` SwiGLU blocks in a row; with `norm` each is a residual one behind a norm."""
    torch.manual_seed(0)
    block = PreNormBlock if norm else SwiGLU
    return nn.Sequential(*(block(width, up * width) for _ in range(blocks)))


def llama(
    *, hidden: int, layers: int, heads: int, ffn: int, vocabulary: int = 4096, seq: int = 512
) -> nn.Module:
    """Return a randomly initialized `LlamaForCausalLM` with float32 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=seq,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def llama_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the next-token loss of `tokens` [batch, seq]."""
    return model(input_ids=tokens, labels=tokens).loss


def under_autocast(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `fn` with its matmuls in bf16 and its parameters left in float32."""

    def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return fn(model, x)

    return run


class _Cut(Exception):
    """The graphs are known; there is nothing to compile."""


def partitioned(
    fn: Callable[..., Any],
    *inputs: Any,
    backend: Callable[..., Any] | str = "inductor",
    options: Mapping[str, Any] | None = None,
) -> tuple[fx.GraphModule, fx.GraphModule, int]:
    """Return what Inductor would compile for `fn(*inputs)`: forward, backward, number of outputs.

    The forward graph returns its outputs first and then what it saves for the backward. Tracing
    stops behind the partitioner, so that nothing is compiled and nothing runs.
    """
    from torch._inductor import compile_fx

    partition = vars(compile_fx)["min_cut_rematerialization_partition"]
    found: list[tuple[fx.GraphModule, fx.GraphModule, int]] = []

    def cut(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        forward, backward = partition(joint, joint_inputs, **kwargs)
        found.append((forward, backward, kwargs["num_fwd_outputs"]))
        raise _Cut

    torch.compiler.reset()
    compiled = torch.compile(
        fn,
        backend=backend,
        options=dict(options) if options else None,
        dynamic=False,
        fullgraph=True,
    )
    with (
        mock.patch.object(compile_fx, "min_cut_rematerialization_partition", cut),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        try:
            compiled(*inputs)
        except Exception:
            if not found:
                raise
    torch.compiler.reset()
    (parts,) = found
    return parts
