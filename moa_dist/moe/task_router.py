"""Mod-Squad's router: one per task, over experts that tasks share (Chen et al. 2022).

arXiv 2212.08066, sections 3.2 and 3.3; code UMass-Foundation-Model/Mod-Squad. A loss raises the
mutual information of tasks and experts, so that a task uses few experts, and each of them much.

Shapes: B sequences of S tokens, T = B * S, G router groups, E experts per group, N groups of
sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moa_dist.config.family import TaskRouterConfig
from moa_dist.errors import DataError
from moa_dist.moe.initialize import Initializer
from moa_dist.moe.router import Choice, Router, Routing
from moa_dist.moe.router_logits import RouterLogits
from moa_dist.moe.statistics import RoutingStatistics
from moa_dist.moe.token_state import RouterState


class TaskRouter(Router):
    """Scores experts by the map of a sequence's task."""

    config: TaskRouterConfig

    def _make_logits(self, d_model: int, init: Initializer) -> nn.Module:
        """Implement `Router._make_logits`: the maps of all tasks as one."""
        return RouterLogits(d_model, self.config.tasks * self.num_experts, init)

    def _decide(
        self, x_BSD: Tensor, token_mask: Tensor | None, choice: Choice | None, state: RouterState
    ) -> Routing:
        """Implement `Router._decide`. Raises DataError if the state does not hold tasks."""
        tasks = state.tasks
        if tasks is None:
            raise DataError(
                "this model has a router per task, but the sequences come without their tasks; "
                "give every folder of `data.train` and `data.valid` a `task`, commands a --task, "
                "or the model `tasks`",
                key="tasks",
            )
        of_tasks = self.logits(x_BSD).unflatten(-1, (self.config.tasks, -1))
        index = tasks[:, None, None, None].expand(*of_tasks.shape[:2], 1, of_tasks.shape[-1])
        logits = of_tasks.gather(2, index).squeeze(2)
        routing = self._by_logits(logits, token_mask, choice, state)
        epsilon = self.config.epsilon * self.config.route_scale
        own = self._by_task(logits, token_mask, tasks)
        return routing._replace(
            topk_weights=routing.topk_weights + epsilon,
            statistics=routing.statistics._replace(own=own),
        )

    def _by_task(self, logits: Tensor, token_mask: Tensor | None, tasks: Tensor) -> Tensor:
        """Sum probabilities of `logits` [B, S, G * E], and count tokens, by task.

        Returns [N, tasks * (G * E + 1)].
        """
        p = logits.unflatten(-1, (self.num_groups, -1)).softmax(-1).flatten(2)
        p = torch.cat([p, torch.ones_like(p[..., :1])], -1)
        if token_mask is not None:
            p = p * token_mask[:, :, None]
        groups = torch.arange(len(tasks), device=tasks.device) // self.config.group_sequences
        num_groups = len(tasks) // self.config.group_sequences
        sums = p.new_zeros(num_groups * self.config.tasks, p.shape[-1])
        sums = sums.index_add(0, groups * self.config.tasks + tasks, p.sum(1))
        return sums.view(num_groups, -1)

    def losses(self, statistics: RoutingStatistics) -> dict[str, Tensor]:
        """Add minus the mutual information of tasks and experts to those of `Router.losses`."""
        losses = super().losses(statistics)
        if not self.config.task_information:
            return losses
        epsilon = self.config.epsilon
        assert statistics.own is not None
        sums = statistics.own.unflatten(-1, (self.config.tasks, -1))
        sums = sums[..., :-1] + epsilon * sums[..., -1:]
        tokens = statistics.num_tokens[..., None, None, None].to(sums.dtype) + epsilon
        joint = sums.unflatten(-1, (self.num_groups, -1)) / tokens  # [..., N, tasks, G, E]
        of_task = joint.sum(-1, keepdim=True) + epsilon
        of_expert = joint.sum(-3, keepdim=True) + epsilon
        information = joint * (joint / (of_task * of_expert) + epsilon).log()
        loss = -information.sum((-1, -3)).mean()
        return losses | {"task_information": self.config.task_information * loss}
