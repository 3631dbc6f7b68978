"""Prune the backbone of a torchvision detector.

    PYTHONPATH=path/to/this/repository python examples/torchvision_detector.py
"""
import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import FrozenBatchNorm2d

from utils.slimming import Pruner, Rules

detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)  # weights="DEFAULT": pretrained
for module in list(detector.backbone.modules()):
    for name, norm in module.named_children():
        if isinstance(norm, FrozenBatchNorm2d):  # what pretrained ones have; a BatchNorm that can be trained is cut
            module.add_module(name, nn.BatchNorm2d(len(norm.weight)))
            module.get_submodule(name).load_state_dict(norm.state_dict(), strict=False)
result = Pruner(detector.backbone.eval(), imgsz=320).rank("l1", Rules(min_share=0.1, coupled=True)).cut(percent=0.3)
detector.backbone = result.slim  # the feature pyramid's outputs keep their channels, so the rest fits
print(f"{result.achieved:.0%} cut", detector.eval()(torch.rand(1, 3, 320, 320))[0].keys())
