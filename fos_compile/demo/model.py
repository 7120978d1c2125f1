"""The model that the demo and the training-curve benchmark train: a small Llama over bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fos_compile.demo.text import VOCABULARY

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A model size with the amount of training that suits the machine.

    Attributes:
        hidden: width of the residual stream; a multiple of 64 per head.
        ffn: width between gate/up and down projections.
        seq: bytes in a window.
        batch: windows in a batch.
        steps: optimizer steps.
        learning_rate: peak of the schedule (linear warm-up, cosine decay).
        eval_batches: held-out batches, spread over the whole held-out text.
    """

    hidden: int
    layers: int
    heads: int
    ffn: int
    seq: int
    batch: int
    steps: int
    learning_rate: float
    eval_batches: int


WORKLOADS = {
    "cpu": Workload(
        hidden=192,
        layers=2,
        heads=3,
        ffn=512,
        seq=128,
        batch=8,
        steps=200,
        learning_rate=3e-3,
        eval_batches=16,
    ),
    "gpu": Workload(
        hidden=512,
        layers=8,
        heads=8,
        ffn=1536,
        seq=512,
        batch=32,
        steps=1000,
        learning_rate=1e-3,
        eval_batches=16,
    ),
}


def build_model(workload: Workload, *, device: torch.device, seed: int) -> LlamaForCausalLM:
    """Return a randomly initialized Llama with fp32 parameters, the same one for the same seed.

    Raises:
        RuntimeError: if transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise RuntimeError(
            'demo: transformers must be installed; run pip install "fos-compile[demo]"'
        ) from error
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=workload.hidden,
        intermediate_size=workload.ffn,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.heads,
        max_position_embeddings=workload.seq,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    # Initialized on the CPU, so that the start is the same on every device.
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(device)


def example() -> tuple[LlamaForCausalLM, dict[str, torch.Tensor]]:
    """Return the demo's model with inputs for `explain`, on the meta device, in bf16."""
    workload = WORKLOADS["cpu"]
    model = build_model(workload, device=torch.device("meta"), seed=0).bfloat16()
    windows = torch.zeros(workload.batch, workload.seq, dtype=torch.int64, device="meta")
    return model, {"input_ids": windows}
