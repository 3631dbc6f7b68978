"""What prune.py does to the weights that a cut leaves: --reconstruct, --absorb, --recalibrate."""
from __future__ import annotations

from argparse import Namespace

import torch

from models.yolo import Model, on_device
from training.sample import SAMPLE_IMAGES, TrainingSample
from utils.slimming import Pruner, PruneResult, slim
from utils.slimming.compensation import absorb, recalibrate
from utils.slimming.reconstruction import reconstruct

REFITTED = 32  # training images that --reconstruct looks at; all are computed at once


def repair(pruner: Pruner[Model], result: PruneResult[Model], opt: Namespace, device: torch.device) -> dict[str, Model]:
    """--reconstruct, --absorb, --recalibrate. Returns the models of all stages by name; the last one is written."""
    def sample(images: int) -> TrainingSample:
        return TrainingSample(opt, result.model, images, device)

    stages = {"before": result.model, "masked": result.masked, "slim": result.slim}
    if opt.reconstruct:
        images = torch.cat([batch for batch, _ in sample(REFITTED)])
        refitted = reconstruct(on_device(result.model, device), pruner.graph, result.masks, images)
        stages["reconstructed"] = result.slim = slim(refitted, result.masks, pruner.graph)
        result.difference = max(result.difference, pruner.check_equivalence(refitted, result.slim))
    elif opt.absorb:
        dense = absorb(on_device(result.model, device), pruner.graph, result.masks, sample(SAMPLE_IMAGES))
        stages["absorbed"] = result.slim = slim(dense, result.masks, pruner.graph)
    if opt.recalibrate:
        stages["recalibrated"] = result.slim = recalibrate(on_device(result.slim, device), sample(opt.recalibrate))
    return stages
