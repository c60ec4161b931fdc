"""Relevance against naive loops, and its rules against values worked out by hand."""

import pytest
import torch

from baseline_methods import GRID, TARGETS, assert_near, images64, model_of
from conftest import MODELS
from reference_relevance import naive_relevance
from vit_reciprocam.methods.baselines import (
    relevance,
)
from vit_reciprocam.methods.lrp import add_rule, copy_rule, linear_rule, matmul_rule


@pytest.mark.parametrize(
    ("name", "start_layer"),
    [*((name, 0) for name in MODELS), *((name, 1) for name in MODELS if name != "one_block")],
)
def test_relevance_is_the_generic_formula_layer_by_layer(name, start_layer):
    model, images = model_of(name), images64()
    maps = relevance(model, images, TARGETS, start_layer=start_layer)
    for at, (image, targets) in enumerate(zip(images, TARGETS, strict=True)):
        for column, target in enumerate(targets):
            row = naive_relevance(model, image, target, start=start_layer)
            wanted = row[model.num_prefix_tokens :].unflatten(0, GRID)
            assert wanted.max() > 0
            assert_near(maps[at, column], wanted)


def test_relevance_of_targets_in_every_form():
    model, images = model_of("plain"), images64()
    every = relevance(model, images, "all")
    assert every.shape == (2, 5, *GRID)
    assert not torch.allclose(every[:, 0], every[:, 1])
    assert_near(relevance(model, images, 3), every[:, 3:4])
    assert_near(relevance(model, images, torch.tensor([1, 4])), every[[0, 1], [1, 4]][:, None])
    assert_near(relevance(model, images, [[2, 0]]), every[:, [2, 0]])
    with torch.no_grad():
        best = model(images).argmax(dim=1)
    assert_near(relevance(model, images), every[[0, 1], best][:, None])
    by_rule = relevance(model, images, lambda logits: logits.argmin(axis=1))
    with torch.no_grad():
        worst = model(images).argmin(dim=1)
    assert_near(by_rule, every[[0, 1], worst][:, None])


def test_rules_by_hand():
    # 1*2 counts for output 0, -1*-3 and 2*3 for output 1; -1*4 and 2*-1, being negative, do not
    x, weight = torch.tensor([[1.0, -1, 2]]), torch.tensor([[2.0, 4, -1], [0, -3, 3]])
    shares = linear_rule(x, weight, torch.tensor([[5.0, 9]]))
    torch.testing.assert_close(shares, torch.tensor([[5.0, 3, 6]]))
    # the product is 1*3 + 2*4 = 11, so R / Z = 2; each factor gets half of each term times that
    a, b = torch.tensor([[1.0, 2]]), torch.tensor([[3.0], [4]])
    of_a, of_b = matmul_rule(a, b, torch.tensor([[22.0]]))
    torch.testing.assert_close(of_a, torch.tensor([[3.0, 8]]))
    torch.testing.assert_close(of_b, of_a.T)
    # by the formula the shares are 6 and -4; scaled, they are in the ratio 6 to 4 and sum to 2
    of_a, of_b = add_rule(torch.tensor([[3.0]]), torch.tensor([[-2.0]]), torch.tensor([[2.0]]))
    torch.testing.assert_close(torch.cat([of_a, of_b]), torch.tensor([[1.2], [0.8]]))
    copied = copy_rule(torch.tensor([2.0, 0]), torch.tensor([1.0, 1]), torch.tensor([3.0, 1]))
    torch.testing.assert_close(copied, torch.tensor([4.0, 0]))


def test_ratios_to_nothing_are_nothing():
    zeros = torch.zeros(1, 2, 2)
    for part in (*add_rule(zeros, zeros, zeros + 1), linear_rule(zeros, zeros[0], zeros + 1)):
        assert torch.equal(part, zeros)


def test_rules_keep_the_sum_of_each_image():
    torch.manual_seed(0)
    r, x, y = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    weight = torch.randn(4, 6, dtype=torch.float64)
    assert_near(linear_rule(torch.randn(2, 5, 6).double(), weight, r).sum((1, 2)), r.sum((1, 2)))
    for parts in (add_rule(x, y, r), matmul_rule(x, torch.randn(2, 4, 4).double(), r)):
        assert_near(sum(part.sum((1, 2)) for part in parts), r.sum((1, 2)))
    assert_near(copy_rule(x, r, r), 2 * r)
