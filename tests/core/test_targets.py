"""Classes by index and by name, in every form that a user may write."""

import numpy as np
import pytest

from vit_reciprocam.core.targets import find_class, resolve_targets, top_classes
from vit_reciprocam.errors import UnknownClassError

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
    with pytest.raises(UnknownClassError, match="none is close"):
        find_class("xylophone", NAMES)


def test_whole_words_are_offered_before_spelling():
    names = ("crate", "tabby, tabby cat", "polecat", "tiger cat", "cat's cradle", *"bdefg")
    with pytest.raises(UnknownClassError) as error:
        find_class("Cat", names)
    assert str(error.value) == (
        "no class is called 'Cat'. Closest: 1 (tabby, tabby cat); 3 (tiger cat); "
        "4 (cat's cradle); 0 (crate); 2 (polecat)"
    )
    with pytest.raises(UnknownClassError, match=r"; 4 \(5th cat\); …$"):
        find_class("cat", [f"{number}th cat" for number in range(1, 8)])


def test_numbers_and_nothing_are_no_names():
    with pytest.raises(UnknownClassError, match="class -1 does not exist: the model has 5"):
        find_class("-1", NAMES)
    with pytest.raises(UnknownClassError, match="got an empty text"):
        find_class(" ", NAMES)


def test_a_function_is_given_the_logits_as_an_array():
    seen = []
    resolve_targets(lambda logits: seen.append(type(logits)) or 0, np.zeros((2, 3)))
    assert seen == [np.ndarray]


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
