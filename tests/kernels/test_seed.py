from __future__ import annotations

import torch

import fos_compile.kernels  # noqa: F401, registers the operators

CPU = torch.device("cpu")


def test_follows_the_default_generator():
    torch.manual_seed(5)
    first, second = torch.ops.fos.seed(device=CPU), torch.ops.fos.seed(device=CPU)
    state = torch.get_rng_state()
    third = torch.ops.fos.seed(device=CPU)
    torch.manual_seed(5)
    assert torch.equal(torch.ops.fos.seed(device=CPU), first)
    torch.set_rng_state(state)
    assert torch.equal(torch.ops.fos.seed(device=CPU), third)
    assert len({first.item(), second.item(), third.item()}) == 3


def test_metadata():
    for seed in (torch.ops.fos.seed(device=CPU), torch.ops.fos.seed(device=torch.device("meta"))):
        assert seed.shape == (1,) and seed.dtype == torch.int64
    assert seed.is_meta


def test_both_words_of_the_key_vary():
    seeds = torch.cat([torch.ops.fos.seed(device=CPU) for _ in range(64)])
    assert (seeds & 0xFFFFFFFF).unique().numel() == 64
    assert (seeds >> 32).unique().numel() == 64


def test_is_tagged_as_random_and_nothing_else_is():
    tag = torch.Tag.nondeterministic_seeded
    assert tag in torch.ops.fos.seed.default.tags
    for name in ("amax", "quantize", "quantize_pair", "dequantize", "scaled_mm"):
        assert tag not in getattr(torch.ops.fos, name).default.tags
