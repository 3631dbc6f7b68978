"""--batch-size -1: as many images a batch as fit into the GPU's memory."""
from __future__ import annotations

from argparse import Namespace
from copy import deepcopy

import torch

from models.yolo import Model, on_device, whole_strides
from training.distributed import World
from training.run import amp_name
from training.settings import DEFAULTS
from utils.errors import UserError

MEMORY_SHARE = 0.8  # of the memory that is free, to be used; what else a step needs fits into the rest
MEMORY_SHARE_WITH_TEACHER = 0.6
MOST_BATCH = 1024
TRIED_BATCHES = (2, 4, 8, 16)  # images; one alone has no variance for BatchNorm where a map is 1x1


def settle_batch(opt: Namespace, model: Model, imgsz: int, world: World) -> Namespace:
    """The options with a number of images for -1, which is printed; on a CPU the usual one."""
    if opt.batch_size != -1:
        return opt
    if world.size > 1:
        raise UserError("--batch-size -1: measures one process; with several give a number")
    if world.device.type != "cuda":
        batch, why = int(DEFAULTS["batch_size"]), "only a GPU's memory is measured"
    else:
        free = torch.cuda.mem_get_info(world.device)[0]
        amp = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(amp_name(opt, world.device))
        side = whole_strides(imgsz * 3 // 2, model.divisor) if opt.multi_scale else imgsz
        memory = memory_per_batch(model, side, world.device, amp)
        batch = fitting_batch(memory, free * (MEMORY_SHARE_WITH_TEACHER if opt.teacher else MEMORY_SHARE))
        why = f"of {free / 2**30:.1f} GiB"
    print(f"--batch-size -1: {batch} ({why})")
    return Namespace(**{**vars(opt), "batch_size": batch})


def memory_per_batch(model: Model, imgsz: int, device: torch.device, amp: torch.dtype | None) -> dict[int, int]:
    """Images a batch -> bytes that a step with them takes at most, as far as they fit."""
    copy, memory = on_device(deepcopy(model), device).train(), {}
    try:
        for batch in TRIED_BATCHES:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            images = torch.rand(batch, copy.yaml["ch"], imgsz, imgsz, device=device)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                outputs = copy(images.contiguous(memory_format=torch.channels_last))
            sum(out.float().mean() for out in outputs).backward()
            memory[batch] = torch.cuda.max_memory_reserved(device)
            del images, outputs
    except torch.cuda.OutOfMemoryError:
        pass
    del copy
    torch.cuda.empty_cache()
    return memory


def fitting_batch(memory: dict[int, int], most: float) -> int:
    """The largest batch, 1 to MOST_BATCH, that takes at most so many bytes on the line through the last of `memory`."""
    if len(memory) < 2:
        return max(memory, default=1)
    (b0, m0), (b1, m1) = list(memory.items())[-2:]
    return min(max(int(b1 + (most - m1) / max((m1 - m0) / (b1 - b0), 1)), 1), MOST_BATCH)
