"""Network slimming for any traceable nn.Module: channel graph, sparsity, ranking, surgery, cost. No YOLO, no files."""
from utils.slimming.graph import ChannelGraph, Masks
from utils.slimming.operations import register_passthrough
from utils.slimming.pruner import Pruner
from utils.slimming.ranking import SCORES, Ranking, Rules, TracedModel, group_mean
from utils.slimming.result import PruneResult
from utils.slimming.surgery import compose_masks, masked, slim
from utils.slimming.targets import TARGETS, Target
from utils.slimming.tracing import trace

__all__ = ["SCORES", "TARGETS", "ChannelGraph", "Masks", "PruneResult", "Pruner", "Ranking", "Rules", "Target",
           "TracedModel", "compose_masks", "group_mean", "masked", "register_passthrough", "slim", "trace"]
