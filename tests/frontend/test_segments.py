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
    with Segments():
        pieces = [torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)]
        assert segments.attended(query, key, value, 1, attend) is None  # they were not split
        made = [segments.attended(q, k, v, 1, attend) for q, k, v in zip(*pieces, strict=True)]
        assert all(one is not None for one in made) and [shape[0] for shape in calls] == [batch]
        found = torch.cat([one for one in made if one is not None], dim=1)
        other = [
            segments.attended(q, k, v, 2, lambda *given: 2.0 * attend(*given)) for q, k, v in zip(*pieces, strict=True)
        ]
    assert segments.attended(pieces[0][0], pieces[1][0], pieces[2][0], 1, attend) is None
    torch.testing.assert_close(found, right.transpose(1, 2))
    assert made[0] is not None and found.data_ptr() == made[0].data_ptr()  # the whole, and no copy of its pieces
    for part, one, two in zip(right.transpose(1, 2).split(lengths, dim=1), made, other, strict=True):
        torch.testing.assert_close(one, part)
        torch.testing.assert_close(two, 2.0 * part)
    assert len(calls) == 2


def test_only_what_belongs_together_is_one() -> None:
    tensor = torch.randn((1, 2, 6, 4), generator=torch.Generator().manual_seed(0))
    with Segments():
        first, second = tensor.split([2, 4], dim=2)
        assert torch.equal(torch.cat([first, second], dim=2), tensor)
        others = tensor.split([4, 2], dim=2)
        apart = tensor.split([2, 4], dim=-2)
        for q, k, v in ((first, first, others[1]), (first, second, second), (first, first, first * 1.0)):
            assert segments.attended(q, k, v, 1, attend) is None
        made = [segments.attended(q, k, k, 1, attend) for q, k in zip((first, second), apart, strict=True)]
        one, two = (part for part in made if part is not None)
        joined = torch.cat([one, two], dim=1)
        for order, dim in (((two, one), 1), ((one, one), 1), ((one,), 1), ((one, two * 2.0), 1), ((one, one), 2)):
            found = torch.cat(order, dim=dim)
            assert found.shape != joined.shape or not torch.equal(found, joined)


def test_other_splits_are_left_alone() -> None:
    tensor = torch.arange(48.0).reshape(1, 2, 6, 4)
    with Segments():
        for split, axis in (
            (tensor.split(3, dim=2), 2),
            (tensor.split([1, 1], dim=1), 1),
            (tensor.reshape(2, 1, 6, 4).split([2, 4], dim=2), 2),
            (tensor[0].split([2, 4], dim=2 - 1), 1),
            (tensor.split([6], dim=2), 2),
        ):
            assert segments.attended(split[0], split[0], split[0], 1, attend) is None
            assert torch.equal(torch.cat(split, dim=axis).flatten(), tensor.flatten())
