"""Pictures of real faces, clips made of them by warping, and a face_landmarker.task, for tests."""

from pathlib import Path

import cv2
import numpy as np
from skimage.data import astronaut

from stableavatar.data.preparation.faces import Face

SIDE = 256
"""Pixels of the picture of a head."""
MOUTH = (125.5, 149.0, 20.0, 0.016)
"""Where the lips of that head meet: x and y of the middle, half the width, how the corners curve up."""
FACE_BOX = np.array([83, 70, 174, 178])
"""Of the head with a closed mouth."""
LANDMARKS = 478
"""Of the mesh in a face_landmarker.task: that of the wheel has 468, without the irises."""


def head(opening: float = 0.0) -> np.ndarray:
    """The astronaut's head, uint8 [256, 256, 3], its lower lip and chin pulled down by `opening` pixels over a dark mouth."""
    x0 = 97
    picture = astronaut()[:SIDE, x0 : x0 + SIDE]
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    middle, line, reach, curve = MOUTH
    gap = opening * np.clip(1 - ((x - middle) / reach) ** 2, 0, 1)
    below = y - (line - curve * (x - middle) ** 2)
    moved = np.where(below > 0, gap * np.clip(1 - (below - gap) / 60, 0, 1), 0).astype(np.float32)
    warped = cv2.remap(picture, x, y - moved, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    warped[(below > 0) & (below < gap)] = (60, 20, 25)
    return warped


def backdrop(width: int, height: int) -> np.ndarray:
    """A grey picture without a face, uint8 [height, width, 3]."""
    return np.full((height, width, 3), 110, np.uint8)


def placed(picture: np.ndarray, heads: list[tuple[np.ndarray, float, float, float]]) -> np.ndarray:
    """A picture with heads on it: each is (pixels, x and y of its left upper corner, scale)."""
    height, width = picture.shape[:2]
    for pixels, x, y, scale in heads:
        where = np.array([[scale, 0, x], [0, scale, y]], np.float32)
        shown = cv2.warpAffine(np.full(pixels.shape[:2], 255, np.uint8), where, (width, height), flags=cv2.INTER_NEAREST) > 0
        moved = cv2.warpAffine(pixels, where, (width, height), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
        picture = np.where(shown[..., None], moved, picture)
    return picture


def face_at(x: float, y: float, size: float = 100, opening: float = 0.0) -> Face:
    """A face at a place, in pixels, its inner lips `opening` heights apart; the other landmarks are all at 0."""
    landmarks = np.zeros((468, 2), np.float32)
    landmarks[152], landmarks[14] = (0, 1), (0, opening)
    return Face(np.array([x - size / 2, y - size / 2, x + size / 2, y + size / 2], np.float32), 1.0, landmarks)


def landmarker_task(path: Path) -> Path:
    """A face_landmarker.task made of the models inside mediapipe 0.10.14, by mediapipe's own tools: its irises all lie at 0."""
    import mediapipe
    from mediapipe.tasks.python.metadata.metadata_writers.metadata_writer import MetadataWriter
    from mediapipe.tasks.python.metadata.metadata_writers.model_asset_bundle_utils import create_model_asset_bundle

    def described(model: bytes, mean: float, std: float) -> bytes:
        writer = MetadataWriter(bytearray(model)).add_general_info("face", "")
        return writer.add_image_input([mean], [std]).populate()[0]

    modules = Path(mediapipe.__file__).parent / "modules"
    detector = (modules / "face_detection" / "face_detection_short_range.tflite").read_bytes()
    mesh = _padded((modules / "face_landmark" / "face_landmark.tflite").read_bytes())
    models = {"face_detector.tflite": described(detector, 127.5, 127.5), "face_landmarks_detector.tflite": described(mesh, 0.0, 255.0)}
    create_model_asset_bundle(models, str(path))
    return path


def _padded(model: bytes) -> bytes:
    """A TFLite model whose largest output is followed by zeros, up to as many numbers as that of a face_landmarker.task has."""
    import flatbuffers
    from mediapipe.tasks.metadata import schema_py_generated as schema

    tree = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(model, 0))
    graph = tree.subgraphs[0]
    place = int(np.argmax([np.prod(graph.tensors[index].shape) for index in graph.outputs]))
    source = graph.tensors[graph.outputs[place]]
    rows = np.zeros((len(source.shape), 2), np.int32)
    rows[-1, 1] = 3 * LANDMARKS - source.shape[-1]

    paddings, padded = schema.TensorT(), schema.TensorT()
    paddings.name, paddings.shape, paddings.type = b"paddings", list(rows.shape), schema.TensorType.INT32
    paddings.buffer = len(tree.buffers)
    padded.name, padded.shape, padded.type = b"padded", [*source.shape[:-1], 3 * LANDMARKS], source.type
    buffer, code, operator = schema.BufferT(), schema.OperatorCodeT(), schema.OperatorT()
    buffer.data = list(rows.tobytes())
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.PAD
    operator.opcodeIndex, first = len(tree.operatorCodes), len(graph.tensors)
    operator.inputs, operator.outputs = [int(graph.outputs[place]), first], [first + 1]

    tree.buffers.append(buffer)
    tree.operatorCodes.append(code)
    graph.tensors += [paddings, padded]
    graph.operators.append(operator)
    graph.outputs = [first + 1 if index == place else int(output) for index, output in enumerate(graph.outputs)]
    builder = flatbuffers.Builder(len(model))
    builder.Finish(tree.Pack(builder), b"TFL3")
    return bytes(builder.Output())
