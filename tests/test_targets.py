import numpy as np
import pytest

from vit_reciprocam.errors import UnknownClassError
from vit_reciprocam.targets import find_class, resolve_targets, top_classes

NAMES = ("tench, Tinca tinca", "crane", "tabby, tabby cat", "tiger cat", "crane")


def test_top_classes_best_first():
    logits = np.array([[0.0, 3.0, 1.0], [5.0, -1.0, 6.0]])
    assert top_classes(logits, 2).tolist() == [[1, 2], [2, 0]]


def test_resolved_targets_are_int64_and_own_their_memory():
    logits = np.zeros((2, 3))
    for targets in (None, 1, "all", [0, 1], [[0, 1]]):
        resolved = resolve_targets(targets, logits)
        assert resolved.dtype == np.int64
        resolved[0, 0] = 2
        assert resolved[1, 0] != 2


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        ("3", 3),
        (3, 3),
        ("Tinca tinca", 0),
        ("TABBY", 2),
        ("tabby, tabby cat", 2),
        (" tiger cat ", 3),
    ],
)
def test_find_class_by_index_name_or_synonym(wanted, index):
    assert find_class(wanted, NAMES) == index


def test_find_class_offers_the_closest():
    with pytest.raises(
        UnknownClassError, match=r"no class is called 'tigercat'. Closest: 3 \(tiger cat\)"
    ):
        find_class("tigercat", NAMES)
    with pytest.raises(UnknownClassError, match=r"Closest: .*2 \(tabby, tabby cat\)"):
        find_class("cat", NAMES)
    with pytest.raises(UnknownClassError, match="none is close"):
        find_class("xylophone", NAMES)


def test_find_class_refuses_an_ambiguous_name():
    with pytest.raises(
        UnknownClassError, match=r"several classes: 1 \(crane\); 4 \(crane\). Pass the index"
    ):
        find_class("crane", NAMES)


def test_find_class_out_of_range_or_without_names():
    with pytest.raises(
        UnknownClassError, match="class 9 does not exist: the model has 5 classes, 0 to 4"
    ):
        find_class("9", NAMES)
    with pytest.raises(UnknownClassError, match="no class names"):
        find_class("tabby", 12)
    assert find_class("9", 12) == find_class(np.int64(9), 12) == 9
    with pytest.raises(UnknownClassError, match=r"a name or an index, got float 1\.5"):
        find_class(1.5, 12)
