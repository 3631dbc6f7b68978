"""python models/yolo.py --cfg yolov5s.yaml: the layers that a model yaml makes, and what they cost."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from utils.parser import HelpfulParser, at_least
from utils.slimming.cost import profile
from utils.tables import text_table


def show(build: Callable[[str], Any]) -> None:
    """Command line -> the table on the screen. build: a yaml's name -> a Model."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--cfg", default="yolov5s.yaml", help="model yaml, here or in models/ and models/hub/")
    parser.add_argument("--imgsz", "--img", "--img-size", type=at_least(32), default=640,
                        help="image size of the GFLOPs")
    opt = parser.parse_args()
    model = build(opt.cfg)
    rows = [[i, row[0], row[1], sum(p.numel() for p in layer.parameters()), row[2], row[3]]
            for i, (layer, row) in enumerate(zip(model.model, model.yaml["backbone"] + model.yaml["head"]))]
    print(text_table([[str(cell) for cell in row] for row in rows],
                     ["", "from", "n", "parameters", "module", "arguments"]))
    cost = profile(model, opt.imgsz, model.yaml["ch"])
    print(f"{opt.cfg}: {sum(1 for _ in model.modules())} layers, {cost.parameters:,} parameters, "
          f"{cost.gflops:.1f} GFLOPs at {opt.imgsz} px")
