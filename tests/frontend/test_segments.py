"""Attention inside segments as one attention: what a tower's loop over windows makes."""

from __future__ import annotations

import pytest
import torch

from qeff_ir.frontend.capture import segments
from qeff_ir.frontend.capture.segments import Segments

Tensor = torch.Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    calls.append(query.shape)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


calls: list[torch.Size] = []


@pytest.mark.parametrize(
    ("lengths", "batch"), [([4, 4, 4], 3), ([4, 4, 2, 3], 4), ([1] * 6 + [30], 1), ([1, 2], 2), ([5, 5], 2)]
)
def test_segments_do_not_see_one_another(lengths: list[int], batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn((1, 4, sum(lengths), 8), generator=generator)
    key, value = (torch.randn((1, 2, sum(lengths), 8), generator=generator) for _ in range(2))
    parts = [torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)]
    right = torch.cat([attend(q, k, v, None) for q, k, v in zip(*parts, strict=True)], dim=2)
    calls.clear()
    with Segments() as found:
        whole = [torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)]
        assert [len(part) for part in whole] == [1, 1, 1] and not found.all_taken
        (one,), (two,), (three,) = whole
        assert segments.lengths_of(query, key, value) is None  # they were not split
        known = segments.lengths_of(one, two, three)
        assert known is not None and known == tuple(lengths) and found.all_taken
    assert segments.lengths_of(one, two, three) is None
    made = segments.attention(one, two, three, known, attend)
    torch.testing.assert_close(made, right)
    assert [shape[0] for shape in calls] == [batch]


def test_other_splits_are_left_alone() -> None:
    tensor = torch.arange(48.0).reshape(1, 2, 6, 4)
    with Segments() as found:
        for split, count in (
            (tensor.split(3, dim=2), 2),
            (tensor.split([1, 1], dim=1), 2),
            (tensor.split([2, 4], dim=-2), 1),
            (tensor.reshape(2, 1, 6, 4).split([2, 4], dim=2), 2),
            (tensor[0].split([2, 4], dim=2 - 1), 2),
            (tensor.split([6], dim=2), 1),
        ):
            assert len(split) == count
        parts = tensor.split([2, 4], dim=2)
        other = tensor.split([4, 2], dim=2)
        assert segments.lengths_of(parts[0], parts[0], other[0]) is None
    assert not found.all_taken
