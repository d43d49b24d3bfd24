"""The edit at any shape and any list of rows."""

from __future__ import annotations

import pytest
import torch
from family import FAMILY, compare, weights

from fastreft import functional as F

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 70), d=st.integers(1, 150), r=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_shapes(n, d, r, seed, data):
    torch.manual_seed(seed)
    r = min(r, d)
    method = data.draw(st.sampled_from(FAMILY))
    rows = data.draw(st.none() | st.lists(st.integers(-1, n - 1), max_size=80)) if n else None
    index = None if rows is None else torch.tensor(rows, dtype=data.draw(st.sampled_from([torch.int64, torch.int32])))
    if n:
        compare(method, torch.randn(n, d), weights(method, d, r, torch.float32), rows=index, close=1e-4)
    assert F.loreft(torch.randn(n, d), *weights("loreft", d, r, torch.float32)).shape == (n, d)
