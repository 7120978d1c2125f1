"""Error messages, also where Dynamo or a pickle carries them."""

from __future__ import annotations

import pickle

import pytest
import torch

import fos_compile
from fos_compile.kernels.errors import FosError, InvalidArgument, UnsupportedArgument


@pytest.mark.parametrize("kind", [InvalidArgument, UnsupportedArgument])
def test_message_names_everything_and_survives_pickling(kind):
    plain = kind("op", "arg", "good", 3)
    assert str(plain) == "op: arg must be good, got 3"
    fixed = kind("op", "arg", "good", 3, "fix it")
    assert str(fixed) == "op: arg must be good, got 3; fix it"
    assert str(pickle.loads(pickle.dumps(fixed))) == str(fixed)
    assert isinstance(fixed, FosError) and str(kind("of torch's own")) == "of torch's own"


def test_dynamo_reports_the_error_and_not_its_class():
    compiled = torch.compile(
        lambda x: fos_compile.quantize(x, scale_rule="best").values, fullgraph=True, backend="eager"
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"scale_rule.*one of mse, .*best"):
        compiled(torch.randn(4, 64))
