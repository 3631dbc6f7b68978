"""Slim an ultralytics YOLO11: sparsity in callbacks of its trainer, cut by Pruner, fine-tune by its trainer.

    pip install ultralytics
    PYTHONPATH=path/to/this/repository python examples/ultralytics_yolo11.py yolo11n.pt coco128.yaml

YOLOv8 to YOLO26 go the same way. Blocks with attention stay whole.
"""
from __future__ import annotations

import sys
from typing import Any

from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from utils.slimming import Pruner, Rules, trace
from utils.slimming.graph import batch_norms
from utils.slimming.target_sparsity import TargetSparsity


def sparsify(yolo: YOLO, share: float) -> None:
    """Let the next training take this share of the channels to exactly 0."""
    def start(trainer: Any) -> None:
        graph = trace(trainer.model)
        names = graph.prunable_norms(coupled=True)
        norms, copies = (list(batch_norms(model, names).values()) for model in (trainer.model, trainer.ema.ema))
        target = TargetSparsity(norms, share, copies, groups=[graph.group[graph.norms[name]] for name in names])
        trainer.optimizer.register_step_pre_hook(lambda *_: target.observe())
        trainer.optimizer.register_step_post_hook(lambda *_: target.shrink((trainer.epoch + 1) / trainer.epochs))

    yolo.add_callback("on_train_start", start)


def slim(yolo: YOLO, share: float) -> nn.Module:
    """The model without this share of the channels."""
    model = yolo.model.float()
    result = Pruner(model, imgsz=640).rank(rules=Rules(min_share=0.1, coupled=True)).cut(percent=share)
    print(*result.notes, f"|slim - masked| {result.difference:.1e}", sep="\n")
    return result.slim.requires_grad_(True)


def finetune(model: nn.Module, **settings: Any) -> YOLO:
    """Train it by ultralytics' trainer, which would build the model anew from its yaml."""
    class SlimTrainer(DetectionTrainer):
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            return model

    yolo = YOLO(model.yaml["yaml_file"], task="detect")  # type: ignore[index]
    yolo.train(trainer=SlimTrainer, **settings)
    return yolo


def main(weights: str, data: str, share: float = 0.5, **settings: Any) -> YOLO:
    yolo = YOLO(weights)
    sparsify(yolo, share)
    yolo.train(data=data, amp=False, **settings)
    sparse = YOLO(yolo.trainer.last)  # the best weights may be from before the channels went
    return finetune(slim(sparse, share), data=data, amp=False, **settings)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], epochs=40)
