"""Small graphs made by hand: what is found in them, in which order, and what a piece computes."""

from pathlib import Path

import numpy as np
import pytest

from onnx import TensorProto, helper, numpy_helper
from vit_reciprocam.errors import ModelError
from vit_reciprocam.onnx.insert.branch import Branch
from vit_reciprocam.onnx.insert.graph import Graph


def info(name, kind=TensorProto.FLOAT, shape=(2,)):
    return helper.make_tensor_value_info(name, kind, shape)


def graph_of(*nodes, weights=()):
    graph = helper.make_graph(nodes, "test", [info("x")], [info("y")], weights)
    opsets = [helper.make_opsetid("", 17)]
    return Graph(helper.make_model(graph, opset_imports=opsets, ir_version=8), Path())


def kinds(graph, numbers=None):
    nodes = graph.nodes if numbers is None else [graph.nodes[number] for number in numbers]
    return [node.op_type for node in nodes]


NODE = helper.make_node
WEIGHT = numpy_helper.from_array(np.array([3, 5], np.float32), "w")
# y = |x| * w + relu(x), its nodes in an order in which they cannot run
DIAMOND = (
    NODE("Add", ["product", "positive"], ["y"]),
    NODE("Mul", ["size", "w"], ["product"]),
    NODE("Relu", ["x"], ["positive"]),
    NODE("Abs", ["x"], ["size"]),
)


def test_nodes_are_sorted_and_otherwise_keep_their_order():
    assert kinds(graph_of(*DIAMOND, weights=[WEIGHT])) == ["Relu", "Abs", "Mul", "Add"]
    ready = [DIAMOND[3], DIAMOND[2], DIAMOND[1], DIAMOND[0]]
    assert kinds(graph_of(*ready, weights=[WEIGHT])) == ["Abs", "Relu", "Mul", "Add"]


def test_nodes_that_wait_for_each_other_are_refused():
    with pytest.raises(ModelError, match="'first' depends on itself"):
        graph_of(NODE("Relu", ["b"], ["a"], name="first"), NODE("Abs", ["a"], ["b"]))


def test_ways_through_a_graph():
    graph = graph_of(*DIAMOND, weights=[WEIGHT])
    assert graph.dependents("size") == {"size", "product", "y"}
    assert kinds(graph, graph.nodes_above(["product"])) == ["Abs", "Mul"]
    assert kinds(graph, graph.nodes_above(["y"], until=["product"])) == ["Relu", "Add"]
    below = graph.nodes_between(["size"], ["y"])
    assert kinds(graph, below) == ["Mul", "Add"]
    assert graph.values_entering(below) == ["size", "positive"]
    assert kinds(graph, graph.consumers("x")) == ["Relu", "Abs"]
    assert graph.producer("x") is None
    assert graph.producer("w") is None


def test_pieces_compute_what_they_should():
    graph = graph_of(*DIAMOND, weights=[WEIGHT])
    x = np.array([-1, 2], np.float32)
    found = graph.run({"x": x}, ["y", "x", "w"])
    np.testing.assert_array_equal(found["y"], [3, 12])
    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_array_equal(found["w"], [3, 5])
    given = {"product": x, "positive": x}  # nothing above them is run
    np.testing.assert_array_equal(graph.run(given, ["y"])["y"], [-2, 4])
    assert graph.constant("size") is None
    np.testing.assert_array_equal(graph.constant("w"), [3, 5])


def with_a_branch():
    """y = |x| if the sum of x is not 0, else x; only inside of the If node |x| is taken."""
    inner = helper.make_graph([NODE("Identity", ["size"], ["z"])], "then", [], [info("z")])
    other = helper.make_graph([NODE("Identity", ["x"], ["z"])], "else", [], [info("z")])
    return graph_of(
        NODE("If", ["any"], ["y"], then_branch=inner, else_branch=other),
        NODE("Cast", ["sum"], ["any"], to=TensorProto.BOOL),
        NODE("ReduceSum", ["x"], ["sum"], keepdims=0),
        NODE("Abs", ["x"], ["size"]),
    )


def test_what_nodes_take_inside_of_them_is_seen():
    graph = with_a_branch()
    assert kinds(graph)[-1] == "If"  # although its input alone would let it run earlier
    assert kinds(graph, graph.nodes_above(["y"])) == kinds(graph)
    assert kinds(graph, graph.consumers("size")) == ["If"]
    assert "z" in graph.names
    x = np.array([-1, 2], np.float32)
    np.testing.assert_array_equal(graph.run({"x": x}, ["y"])["y"], [1, 2])


def test_copies_take_other_values_also_inside_of_nodes():
    graph, branch = with_a_branch(), Branch(17)
    numbers = graph.nodes_between(["size"], ["y"])
    copied = branch.copy(graph, numbers, {"size": "other"})
    assert set(copied) == {"size", "y"}
    (node,) = branch.nodes
    assert list(node.output) == [copied["y"]] != ["y"]
    bodies = {each.name: each.g for each in node.attribute}
    assert list(bodies["then_branch"].node[0].input) == ["other"]
    assert list(bodies["else_branch"].node[0].input) == ["x"]
    assert graph.nodes[numbers[0]] == with_a_branch().nodes[numbers[0]]
