"""How a speed is shared out between precision, image size and channels.

Each lever takes a factor of the time, and the factors multiply: their logarithms add up. What a lever costs grows with
the square of its logarithm: the first part is cheap, whichever lever gives it. So two levers together cost less than
either alone. For a speed x = ln(times faster) that is to come from image size and channels, the loss a s^2 + b c^2,
s + c = x, is smallest at s = x b / (a + b).
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

UNHEALED = 0.25     # what training leaves of the loss right after a cut with --reconstruct: an assumption
MOST_SIZES = 5      # image sizes that are tried
MOST_CHANNELS = 2.5  # times faster that channels alone are asked for, while images can be smaller
NO_CUT = 0.97       # share of the time from which on no channel is cut for the rest


@dataclass(frozen=True)
class Levers:
    """What was chosen for a speed."""

    imgsz: int                  # pixels: the size that the slim model is for
    latency: float              # share of the milliseconds, at that size and precision, that channels are to leave
    rows: list[dict[str, Any]]  # the table that says why

    @property
    def cuts(self) -> bool:
        """Do channels go at all?"""
        return self.latency < NO_CUT


@dataclass(frozen=True)
class Measured:
    """What is known of the model before, without any training. Losses are of mAP50-95 on the val images."""

    precision: float              # times faster in the precision that is asked for
    sizes: Mapping[int, float]    # image size (pixels) -> times faster; 1.0 for the size that the model is for
    size_losses: Mapping[int, float]
    probe: float                  # times faster with the channels of a probe cut, which is repaired but not trained
    probe_loss: float


def choose(wanted: float, known: Measured) -> Levers:
    """The levers for a model that is to be `wanted` times faster."""
    whole = max(known.sizes)
    rest = wanted / known.precision
    a, b = curvature(known.sizes, known.size_losses), UNHEALED * curvature({0: known.probe}, {0: known.probe_loss})
    share = share_of_images(a, b)
    imgsz = choose_size(rest, share, known.sizes)
    latency = min(known.sizes[imgsz] / rest, 1.0)
    channels = 1 / latency if latency < NO_CUT else 1.0
    return Levers(imgsz, latency, [
        {"lever": "precision", "from": "fp32", "to": "int8" if known.precision != 1 else "fp32",
         "times faster": known.precision, "mAP50-95 alone": ""},
        {"lever": "image size", "from": whole, "to": imgsz, "times faster": known.sizes[imgsz],
         "mAP50-95 alone": -known.size_losses[imgsz]},
        {"lever": "channels", "from": "100%", "to": f"{latency:.0%} of the time" if channels > 1 else "100%",
         "times faster": channels, "mAP50-95 alone": ""},
        {"lever": "all", "from": "", "to": "", "times faster": known.precision * known.sizes[imgsz] * channels,
         "mAP50-95 alone": ""}])


def candidate_sizes(imgsz: int, divisor: int) -> list[int]:
    """Multiples of `divisor` from half of `imgsz` to below it, at most MOST_SIZES evenly spread ones, largest first."""
    sizes = list(range(imgsz - divisor, imgsz // 2 - 1, -divisor))
    chosen = np.linspace(0, len(sizes) - 1, min(MOST_SIZES, len(sizes))).round().astype(int)
    return [sizes[i] for i in chosen]


def curvature(factors: Mapping[Any, float], losses: Mapping[Any, float]) -> float:
    """The a of loss = a ln(factor)^2 by least squares, at least 0. factors: times faster. losses: of mAP50-95."""
    squares = np.array([math.log(max(factor, 1.0)) ** 2 for factor in factors.values()])
    values = np.array([losses[key] for key in factors])
    return max(float(squares @ values / max(squares @ squares, 1e-12)), 0.0)


def share_of_images(a: float, b: float) -> float:
    """b / (a + b): how much of a speed's logarithm comes from smaller images; half where neither lever costs."""
    return 0.5 if a + b <= 0 else b / (a + b)


def choose_size(wanted: float, share: float, factors: Mapping[int, float]) -> int:
    """The image size (pixels) whose factor is nearest to `share` of `wanted` times faster, in logarithms.

    factors: size -> times faster, 1.0 for the whole one. Channels are asked for no more than MOST_CHANNELS where a
    smaller size can prevent it.
    """
    if wanted <= 1:
        return max(factors)
    possible = [size for size, factor in factors.items() if wanted / factor <= MOST_CHANNELS] or [min(factors)]
    return min(possible, key=lambda size: (abs(math.log(factors[size]) - share * math.log(wanted)), -size))
