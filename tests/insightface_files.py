"""Models that are called as those of InsightFace's buffalo_l are, for tests."""

from pathlib import Path

import numpy as np
import pytest


def bright_cell_detector(path: Path, points: np.ndarray | None = None) -> None:
    """An SCRFD-like network: a cell of 32 pixels is a face, and the surer the brighter it is.

    Args:
        points: eyes, nose and corners of the mouth in a cell, [5, 2] in sides of it; None for all in its corner.
    """
    onnx = pytest.importorskip("onnx")
    helper, nodes, outputs = onnx.helper, [], {}

    def node(kind: str, inputs: list[str], name: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    places = np.zeros((1, 10), np.float32) if points is None else points.reshape(1, 10).astype(np.float32)
    constants = {"column": np.array([-1, 1], np.int64), "zero": np.float32(0), "one": np.float32(1), "places": places}
    grey = node("ReduceMean", ["input.1"], "grey", axes=[1], keepdims=1)
    for stride in (8, 16, 32):
        pooled = node("AveragePool", [grey], f"pooled{stride}", kernel_shape=[stride, stride], strides=[stride, stride])
        single = node("Reshape", [pooled, "column"], f"single{stride}")
        both = node("Reshape", [node("Concat", [single, single], f"pair{stride}", axis=1), "column"], f"both{stride}")
        nothing, whole = node("Mul", [both, "zero"], f"nothing{stride}"), f"whole{stride}"
        node("Add", [nothing, "one"], whole)
        outputs[f"score{stride}"] = node("Clip" if stride == 32 else "Mul", [both, "zero"] + ["one"] * (stride == 32), f"score{stride}"), 1
        outputs[f"box{stride}"] = node("Concat", [nothing, nothing, whole, whole], f"box{stride}", axis=1), 4
        outputs[f"points{stride}"] = node("Add", [nothing, "places"], f"points{stride}"), 10
    ordered = [outputs[f"{kind}{stride}"] for kind in ("score", "box", "points") for stride in (8, 16, 32)]
    ends = [helper.make_tensor_value_info(name, 1, ["cells", width]) for name, width in ordered]
    start = helper.make_tensor_value_info("input.1", 1, [1, 3, "height", "width"])
    held = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "cells", [start], ends, held)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


def colour_recogniser(path: Path, seed: int = 0) -> None:
    """An ArcFace-like network: 512 random mixtures of the colours of the four quarters of an aligned face."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    mixture = np.random.default_rng(seed).standard_normal((12, 512)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["input.1"], ["quarters"], kernel_shape=[56, 56], strides=[56, 56]),
        helper.make_node("Flatten", ["quarters"], ["flat"]),
        helper.make_node("MatMul", ["flat", "mixture"], ["embedding"]),
    ]
    start = helper.make_tensor_value_info("input.1", 1, ["batch", 3, 112, 112])
    end = helper.make_tensor_value_info("embedding", 1, ["batch", 512])
    graph = helper.make_graph(nodes, "recogniser", [start], [end], [onnx.numpy_helper.from_array(mixture, "mixture")])
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
