"""Non-maximum suppression as a part of an ONNX file, for runtimes that want boxes: the boxes of utils.boxes.nms.

The file then gives (B, max_det, 6): x1, y1, x2, y2 in pixels, confidence, class; most confident first, and rows of
zeros where there are no more.
"""
from __future__ import annotations

from typing import Any

from models.formats.format import Suppression

# ONNX's own notation. A box competes as its best class only, or, agnostic, as of one class.
GRAPH = """<ir_version: {ir}, opset_import: ["" : {opset}]>
nms (float[{batch}, N, {numbers}] decoded) => (float[{batch}, {most}, 6] detections)
<int64[1] to0 = {{0}}, int64[1] to1 = {{1}}, int64[1] to2 = {{2}}, int64[1] to4 = {{4}}, int64[1] to5 = {{5}},
 int64[1] end = {{{numbers}}}, int64[1] most = {{{most}}}, int64[6] room = {{0, 0, 0, 0, {most}, 0}},
 int64[2] flat = {{0, -1}}, int64[3] column = {{0, -1, 1}}, int64[3] rows = {{1, 1, 6}}, int64[2] places = {{0, 2}},
 float half = {{0.5}}, float zero = {{0}},
 float[1] iou = {{{iou}}}, float[1] conf = {{{conf}}}{every}>
{{
  filled = Pad(decoded, room)
  boxes = Slice(filled, to0, to4, to2)
  objectness = Slice(filled, to4, to5, to2)
  chances = Slice(filled, to5, end, to2)
  scores = Mul(chances, objectness)
  best, label = TopK<axis = 2>(scores, to1)
  {competing}
  perclass = Transpose<perm = [0, 2, 1]>(alone)
  chosen = NonMaxSuppression<center_point_box = 1>(boxes, perclass, most, iou, conf)
  where = Gather<axis = 1>(chosen, places)
  score = Reshape(best, flat)
  values = GatherND(score, where)
  nothing = Mul(score, zero)
  kept = ScatterND(nothing, where, values)
  confidence, order = TopK<axis = 1>(kept, most)
  centre = Slice(boxes, to0, to2, to2)
  sides = Slice(boxes, to2, to4, to2)
  halves = Mul(sides, half)
  low = Sub(centre, halves)
  high = Add(centre, halves)
  number = Cast<to = 1>(label)
  every_row = Concat<axis = 2>(low, high, best, number)
  index = Reshape(order, column)
  index6 = Expand(index, rows)
  ordered = GatherElements<axis = 1>(every_row, index6)
  found = Greater(confidence, zero)
  found01 = Cast<to = 1>(found)
  mask = Reshape(found01, column)
  detections = Mul(ordered, mask)
}}"""
BY_CLASS = "same = Equal(label, every)\n  same01 = Cast<to = 1>(same)\n  alone = Mul(best, same01)"
AGNOSTIC = "alone = Identity(best)"


def with_nms(proto: Any, options: Suppression, classes: int) -> Any:
    """An ONNX model that gives boxes instead of decoded (B, N, classes + 5)."""
    from onnx import compose, parser

    batch = proto.graph.output[0].type.tensor_type.shape.dim[0]
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    every = f", int64[{classes}] every = {{{', '.join(map(str, range(classes)))}}}"
    text = GRAPH.format(ir=proto.ir_version, opset=opset, batch=batch.dim_value or batch.dim_param,
                        numbers=classes + 5, every="" if options.agnostic else every,
                        most=options.max_det, iou=f"{options.iou:.9f}", conf=f"{options.conf:.9f}",
                        competing=AGNOSTIC if options.agnostic else BY_CLASS)
    return compose.merge_models(proto, compose.add_prefix(parser.parse_model(text), "nms/"),
                                io_map=[(proto.graph.output[0].name, "nms/decoded")])

