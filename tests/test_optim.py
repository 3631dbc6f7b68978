"""Schedule, EMA and early stopping: stock's values and what a short run needs."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from models.yolo import Model
from training.optimizer import EarlyStopping, ModelEMA, Schedule, build_optimizer, ema_tau
from training.settings import read_hyp
from utils.errors import UserError

HYP = {"lr0": 0.01, "lrf": 0.01, "momentum": 0.937, "warmup_epochs": 3.0, "warmup_momentum": 0.8, "warmup_bias_lr": 0.1}


def test_ema_follows_stocks_trace(golden):
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = ModelEMA(model)
    trace = []
    for _ in range(200):
        model.weight.data += 0.01
        ema.update()
        trace.append(float(ema.ema.weight.detach()))
    assert np.allclose(trace, golden["ema/trace"], atol=1e-5)


def test_groups_hold_every_parameter_once_and_only_weights_decay():
    model = Model("yolov5n.yaml", nc=2)
    bias, weight, norm = build_optimizer(model, "SGD", 0.01, 0.9, 5e-4).param_groups
    assert sum(len(g["params"]) for g in (bias, weight, norm)) == len(list(model.parameters()))
    assert [g["weight_decay"] for g in (bias, weight, norm)] == [0, 5e-4, 0]
    assert all(p.dim() == 4 for p in weight["params"]) and len(norm["params"]) == 57


def test_warmup_never_swallows_a_short_run():
    assert Schedule(HYP, epochs=2, batches=4, batch_size=16, nbs=64).warmup == 2
    assert Schedule(HYP, epochs=100, batches=50, batch_size=16, nbs=64).warmup == 150


def test_schedule_reaches_its_ends():
    schedule = Schedule(HYP, epochs=10, batches=100, batch_size=16, nbs=64)
    optimizer = build_optimizer(nn.Conv2d(1, 1, 1), "SGD", 0.01, 0.9, 0)
    schedule.apply(optimizer, 0)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0, 0])
    assert optimizer.param_groups[0]["momentum"] == 0.8
    assert (schedule.accumulate(0), schedule.accumulate(999)) == (1, 4)
    schedule.apply(optimizer, 999)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.01 * ((1 - 0.9) * 0.99 + 0.01))
    cosine = Schedule(HYP, 10, 100, 16, 64, cosine=True)
    assert (cosine.factor(0), cosine.factor(10)) == pytest.approx((1, 0.01))


def test_early_stopping():
    stopper = EarlyStopping(3)
    assert stopper.better(0, 0.5) and not stopper.better(1, 0.4)
    assert not stopper.over(2) and stopper.over(3)
    assert not EarlyStopping(0).over(10_000)


def test_fused_parameters_stay_put_for_the_ema():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    ema = ModelEMA(model)
    model(torch.rand(2, 1, 4, 4))
    ema.update()
    assert int(ema.ema[1].num_batches_tracked) == 1


@pytest.mark.parametrize("steps", [520, 750, 5000])
def test_a_short_run_is_averaged_over_its_last_twentieth(steps):
    decay = 0.9999 * (1 - math.exp(-steps / ema_tau(steps)))
    assert 1 / (1 - decay) == pytest.approx(steps / 20, rel=0.05)


def test_a_long_run_is_averaged_as_yolov5_does():
    assert ema_tau(20_000) == ema_tau(10 ** 6) == 2000


def test_hyp_files_of_yolov5_are_taken():
    """Every key that its releases' files have; and a misspelt one is named."""
    stock = {"lr0": 0.01, "lrf": 0.01, "momentum": 0.937, "weight_decay": 0.0005,
             "warmup_epochs": 3.0, "warmup_momentum": 0.8, "warmup_bias_lr": 0.1,
             "box": 0.05, "cls": 0.5, "cls_pw": 1.0, "obj": 1.0, "obj_pw": 1.0,
             "iou_t": 0.20, "anchor_t": 4.0, "fl_gamma": 0.0, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4,
             "degrees": 0.0, "translate": 0.1, "scale": 0.5, "shear": 0.0, "perspective": 0.0, "flipud": 0.0,
             "fliplr": 0.5, "mosaic": 1.0, "mixup": 0.0, "copy_paste": 0.0, "anchors": 3, "label_smoothing": 0.0}
    assert read_hyp(stock)["lr0"] == 0.01
    with pytest.raises(UserError, match="unknown 'lrO'"):
        read_hyp({"lrO": 0.1})
