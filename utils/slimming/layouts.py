"""Rules of the channel graph for operations that move dimensions: shapes, views, parts, transpositions, shuffles."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

import utils.slimming.operations as ops
from utils.slimming.ledger import Ledger
from utils.slimming.values import (
    Channels,
    Count,
    Grouped,
    Shape,
    argument,
    is_channel_dimension,
    is_count_of,
    is_map,
    is_spatial,
)


class Layouts(Ledger):
    """A rule gets the node and its arguments, and gives the value."""

    # --- shapes ---

    def shape_query(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x.shape, x.size(), x.size(2), x.dim(), and attributes such as x.device, which depend on no channel."""
        x, *rest = args
        is_attribute = node.target is getattr
        if not isinstance(x, Channels) or node.target == "dim" or (is_attribute and rest[0] in ops.CHANNEL_FREE):
            return None
        if is_attribute and rest[0] != "shape":
            return self.unknown([x], {}, f"attribute '{rest[0]}'{self.place}")
        shape, dim = Shape(x.ids, x.space), argument(rest, kwargs, 0, "dim")
        if x.spread:
            return self.unknown([x], {}, f"the number of channels{self.place}")
        return self.item(node, [shape, dim], {}) if dim is not None and node.target == "size" else shape

    def quotient(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """channels // 2"""
        number, divisor = args
        if isinstance(number, Count) and isinstance(divisor, int) and len(number.ids) % (number.divisor * divisor) == 0:
            return replace(number, divisor=number.divisor * divisor)
        return self.strange(node, args, kwargs)

    # --- views ---

    def flatten(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        x, start = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "start_dim", 0)
        return self.flattened(node, x, start, argument(args, kwargs, 2, "end_dim", -1))

    def flattened(self, node: fx.Node, x: Any, start: Any, end: Any) -> Any:
        """x.flatten(1) makes vectors; from 2 on, dimensions behind the channels are laid into one."""
        if x is None and (start, end) == (1, -1):
            return Channels(np.zeros(0, int), np.zeros(0, bool), 0, spread=True)  # such as the image
        if isinstance(x, Channels) and isinstance(start, int) and isinstance(end, int):
            end = end + 2 + x.space if end < 0 else end
            if start == 1 and end == 1 + x.space:
                return replace(x, space=0, spread=x.spread or x.space > 0)
            if 2 <= start <= end < 2 + x.space:
                return replace(x, space=x.space - end + start)
        if isinstance(x, Grouped) and (start, end) == (1, 2):
            return Channels(x.ids.ravel(), x.loose.ravel())
        return self.strange(node, [x], {})

    def view(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x.view(batch, channels, ...), where these numbers come from x.shape or are -1."""
        x, *sizes = args
        if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
            sizes = list(sizes[0])
        if x is None and len(sizes) == 2 and not any(isinstance(size, Count) for size in sizes):
            return self.flattened(node, None, 1, -1)
        value: Any = None
        if not kwargs and len(sizes) > 1 and (sizes[0] is None or sizes[0] == -1):
            if isinstance(x, Grouped):
                value = self.ungrouped(x, *sizes[1:])
            elif isinstance(x, Channels) and not x.spread:
                value = self.viewed(x, *sizes[1:])
            elif isinstance(x, Channels) and sizes[1:] == [-1]:
                value = x
        return self.strange(node, args, kwargs) if value is None else value

    def ungrouped(self, x: Grouped, channels: Any, *space: Any) -> Channels | None:
        whole = isinstance(channels, Count) and channels.divisor == 1 and self.same_number(channels.ids, x.ids.ravel())
        if space == (None, None) and (whole or channels == -1):
            return Channels(x.ids.ravel(), x.loose.ravel())
        return None

    def viewed(self, x: Channels, channels: Any, *space: Any) -> Channels | Grouped | None:
        if is_map(x) and len(space) == 3 and isinstance(channels, int) and channels > 0:
            return self.grouped(x, channels, *space)
        if any(isinstance(size, Count) for size in space):
            return None
        counted = isinstance(channels, Count) and channels.divisor == 1
        if not space and (counted or channels == -1):
            spread = x.space > 0 and not counted
        elif counted and x.space or (x.space == 0 and set(space) == {1} and (counted or channels == -1)):
            spread = False
        else:
            return None
        if counted and not self.same_number(channels.ids, x.ids):
            return None
        return replace(x, space=len(space), spread=spread)

    def grouped(self, x: Channels, groups: int, of_a_group: Any, *space: Any) -> Grouped | None:
        """(B, C, H, W) -> (B, groups, C // groups, H, W)."""
        counted = is_count_of(of_a_group, x) and of_a_group.divisor == groups
        if space != (None, None) or len(x.ids) % groups or not (counted or of_a_group == -1):
            return None
        self.align(x.ids, groups)
        return Grouped(x.ids.reshape(groups, -1), x.loose.reshape(groups, -1))

    def squeeze(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x.squeeze(-1), and x.squeeze() of what a pool has left a pixel of."""
        x, dims = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "dim")
        if not isinstance(x, Channels) or x.spread:
            return self.strange(node, args, kwargs)
        if dims is None:
            return replace(x, space=0)
        dims = dims if isinstance(dims, (list, tuple)) else (dims,)
        return replace(x, space=x.space - len(dims)) if is_spatial(x, *dims) else self.strange(node, args, kwargs)

    def unsqueeze(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        x, dim = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "dim")
        if isinstance(x, Channels) and not x.spread and is_spatial(more := replace(x, space=x.space + 1), dim):
            return more
        return self.strange(node, args, kwargs)

    def expand(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x.expand_as(other), where both have the same channels."""
        x, other = args
        alike = isinstance(x, Channels) and isinstance(other, Channels) and x.space == other.space and not x.spread
        if alike and self.same_number(x.ids, other.ids):
            return x
        return self.strange(node, args, kwargs)

    # --- parts ---

    def chunk(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x.chunk(n, dim): parts along the channels, or in space."""
        x, count, dim = args[0], argument(args, kwargs, 1, "chunks"), argument(args, kwargs, 2, "dim", 0)
        if not isinstance(x, Channels) or x.spread or not isinstance(count, int):
            return self.strange(node, args, kwargs)
        if is_spatial(x, dim):
            return [x] * count
        if not is_channel_dimension(x, dim):
            return self.strange(node, args, kwargs)
        if len(x.ids) % count == 0:
            return self.equal_parts(x, count)
        return self.fixed_parts(x, range(0, len(x.ids), -(-len(x.ids) // count)))

    def split(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x.split(size or sizes, dim): parts along the channels, or in space."""
        x, sizes = args[0], argument(args, kwargs, 1, "split_size_or_sections")
        sizes, dim = argument(args, kwargs, 1, "split_size", sizes), argument(args, kwargs, 2, "dim", 0)
        listed = isinstance(sizes, (list, tuple))
        if isinstance(x, Channels) and is_spatial(x, dim) and listed:
            return [x] * len(sizes)
        if isinstance(x, Channels) and is_channel_dimension(x, dim) and not x.spread:
            if is_count_of(sizes, x):
                return self.equal_parts(x, sizes.divisor)
            if isinstance(sizes, int) and sizes > 0:  # the last part takes what is left
                starts = range(0, len(x.ids), sizes)
                return [self.part(x, slice(i, None if i == starts[-1] else i + sizes)) for i in starts]
            if listed and all(isinstance(size, int) for size in sizes) and sum(sizes) == len(x.ids):
                return self.fixed_parts(x, np.cumsum([0, *sizes[:-1]]))
        return self.strange(node, args, kwargs)

    def equal_parts(self, x: Channels, count: int) -> list[Channels]:
        """Parts that stay equal: the code would split elsewhere otherwise."""
        self.align(x.ids, count)
        return [replace(x, ids=ids, loose=loose)
                for ids, loose in zip(np.split(x.ids, count), np.split(x.loose, count))]

    def fixed_parts(self, x: Channels, starts: Any) -> list[Channels]:
        """Parts whose sizes the code states: their channels stay."""
        self.note(f"parts of fixed sizes{self.place}: what is split stays whole", x)
        return [replace(x, ids=ids, loose=loose)
                for ids, loose in zip(np.split(x.ids, starts[1:]), np.split(x.loose, starts[1:]))]

    def part(self, x: Channels, part: slice) -> Channels | None:
        """x[:, part]. The channels that a fixed number counts stay, those behind it may go."""
        count, bounds = len(x.ids), [bound for bound in (part.start, part.stop) if bound is not None]
        if part.step not in (None, 1) or x.spread:
            return None
        if bounds and all(is_count_of(bound, x) for bound in bounds):
            self.align(x.ids, int(np.lcm.reduce([bound.divisor for bound in bounds])))
            places = np.arange(count)[slice(*[b and count // b.divisor for b in (part.start, part.stop)])]
            return replace(x, ids=x.ids[places], loose=x.loose[places])
        if not all(isinstance(bound, int) for bound in bounds) or not len(x.ids[part]):
            return None
        fixed = np.zeros(count, bool)
        for bound in bounds:
            if -count < bound < count:
                fixed[slice(0, bound) if bound >= 0 else slice(bound, None)] = True
        if not fixed[part].any() and len(x.ids[part]) < count:
            fixed[range(count)[part][0]] = True  # something must be left of it
        if fixed.any():
            self.note(f"a part of fixed size{self.place}: the channels that it counts stay",
                      Channels(x.ids[fixed], x.loose[fixed]))
        return replace(x, ids=x.ids[part], loose=x.loose[part])

    def item(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x[index]: an element of a list or a shape, a part of the channels, a crop in space, a new dimension."""
        x, index = args
        if x is None:
            return None
        if isinstance(x, (list, tuple)) and isinstance(index, (int, slice)):
            return x[index]
        if isinstance(x, Shape) and isinstance(index, (int, slice)):
            return [None, Count(x.ids), *[None] * x.space][index]
        if isinstance(x, Channels):
            fixed = node.args[1] if len(node.args) > 1 else None  # an index that is computed is no new dimension
            fixed = fixed if isinstance(fixed, tuple) else (fixed,)
            index = index if isinstance(index, tuple) else (index,)
            part = None if any(isinstance(i, fx.Node) for i in fixed) else self.indexed(x, index)
            if part is not None:
                return part
        return self.unknown([x, *args[1:]], {}, f"index {args[1]}{self.place}")

    def indexed(self, x: Channels, index: tuple) -> Channels | None:
        if any(i is Ellipsis for i in index):
            at = next(k for k, i in enumerate(index) if i is Ellipsis)
            missing = 3 + x.space - sum(i is not None for i in index)
            index = (*index[:at], *[slice(None)] * missing, *index[at + 1:])
        whole: list[Any] = [*index, *[slice(None)] * (2 - len(index))]
        batch, channels, *space = whole
        if batch != slice(None) or not isinstance(channels, slice) or (x.spread and space):
            return None
        if not all(i is None or isinstance(i, (int, slice)) for i in space):
            return None
        more = sum(i is None for i in space) - sum(isinstance(i, int) for i in space)
        part = self.part(x, channels) if channels != slice(None) else x
        return part and replace(part, space=x.space + more)

    # --- places ---

    def spatial_mean(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x.mean((2, 3)), or sum, or amax."""
        x, dims, keepdim = (argument(args, kwargs, i, key) for i, key in enumerate(("input", "dim", "keepdim")))
        dims = dims if isinstance(dims, (list, tuple)) else (dims,)
        if not isinstance(x, Channels) or not is_spatial(x, *dims):
            return self.strange(node, args, kwargs)
        return x if keepdim else replace(x, space=x.space - len(dims))

    def turn(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """Dimensions behind the channels change places, or the two that channels were laid out in."""
        x, *dims = args
        if len(dims) == 1 and isinstance(dims[0], (list, tuple)):
            dims = list(dims[0])
        if kwargs or not all(isinstance(dim, int) for dim in dims):
            return self.strange(node, args, kwargs)
        if isinstance(x, Grouped) and (dims == [0, 2, 1, 3, 4] if node.target in ops.PERMUTES
                                       else sorted(dims) == [1, 2]):
            return Grouped(x.ids.T, x.loose.T)
        if node.target in ops.PERMUTES and dims[:2] == [0, 1]:
            dims = dims[2:]
        return x if isinstance(x, Channels) and is_spatial(x, *dims) else self.strange(node, args, kwargs)

    def shuffle(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        x, factor = argument(args, kwargs, 0, "input"), [*args[1:], *(v for k, v in kwargs.items() if k != "input")]
        if not is_map(x) or len(factor) != 1 or not isinstance(factor[0], int):
            return self.strange(node, args, kwargs)
        return self.shuffled(node.target, x, factor[0])

    def shuffled(self, operation: Any, x: Channels, factor: int) -> Channels:
        """Pixel unshuffle, pixel shuffle (factor: of the sides), or channel shuffle (factor: the groups)."""
        if operation in ops.UNSHUFFLES:
            return Channels(np.repeat(x.ids, factor ** 2), np.repeat(x.loose, factor ** 2))
        if operation in ops.SHUFFLES:  # factor ** 2 channels in a row make one
            ids, loose = x.ids.reshape(-1, factor ** 2), x.loose.reshape(-1, factor ** 2)
            self.align(ids.T.ravel(), factor ** 2)
            return Channels(ids[:, 0], np.logical_or.reduce(loose, 1))
        self.align(x.ids, factor)
        return Channels(x.ids.reshape(factor, -1).T.ravel(), x.loose.reshape(factor, -1).T.ravel())
