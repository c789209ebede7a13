"""Monet: experts that are pairs of halves (Park et al. 2024, arXiv 2412.04139, section 3.2).

Expert (i, j) of N x N is made of the i-th half of one sort and the j-th of another, each sort
chosen by a router of its own. Sums over pairs are taken over one index after the other, so no pair
is ever made; heads pair what their own routers choose.

Shapes: T tokens, H heads, N halves of each sort, m hidden width of an expert, D model width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_dist.config.family import MonetConfig
from moa_dist.kernels.activations import ACTIVATIONS
from moa_dist.models.feed_forward import FeedForward, FFNContext
from moa_dist.moe.dispatch import DispatchPlan
from moa_dist.moe.experts import GroupedLinear
from moa_dist.moe.initialize import LastRowZero, Normal
from moa_dist.moe.routed_module import Gathered, RoutedModule, RoutedProjection
from moa_dist.moe.router import Router, Routing
from moa_dist.moe.router_kinds import make_router


class Monet(RoutedModule, FeedForward):
    """`y = sum over heads h and pairs of g1_hi g2_hj E_ij(x)`; the paper's act is relu squared.

    Horizontal: `E_ij(x) = V_j act(U_i x)`. Vertical: with `a1_i = act(U1_i x)` and `a2_j =
    act(U2_j x)`, the upper half of E_ij is `V1_i [a1_i, a2_j]`, the lower one `V2_j [a1_i, a2_j]`.
    A bias is a weight of one more input, which is 1.
    """

    def __init__(self, config: MonetConfig, d_model: int, init_scale: float) -> None:
        super().__init__()
        self.config = config
        N, H, m, bias = (
            config.router.num_experts,
            config.router.num_heads,
            config.d_expert,
            config.bias,
        )
        init = Normal(init_scale / math.sqrt(d_model))
        out = Normal(init_scale / math.sqrt(H * m))
        up, down = (LastRowZero(x) if bias else x for x in (init, out))
        self.first_router = make_router(config.router, d_model, init=init)
        self.second_router = make_router(config.router, d_model, init=init)
        self.activation = ACTIVATIONS[config.activation].value
        self.is_vertical = config.decomposition == "vertical"
        if self.is_vertical:
            self.first_up = GroupedLinear(N, d_model + bias, m // 2, up)
            self.second_up = GroupedLinear(N, d_model + bias, m // 2, up)
            self.first_down = GroupedLinear(N, m + bias, d_model // 2, down)
            self.second_down = GroupedLinear(N, m + bias, d_model - d_model // 2, down)
        else:
            self.first_up = GroupedLinear(N, d_model + bias, m, up)
            self.second_down = GroupedLinear(N, m + bias, d_model, down)

    def routers(self) -> dict[str, Router]:
        """One router for each sort of halves."""
        return {"first": self.first_router, "second": self.second_router}

    def macs(self, length: int, *, training: bool) -> dict[str, int]:
        """Implement `FeedForward.macs`; sums over halves of all heads are left out."""
        per_row = sum(layer.macs_per_row() for layer in self.expert_layers().values())
        chosen = self.config.router.experts_per_token(training).mean
        return {
            "experts": length * chosen * per_row,
            "routers": sum(router.macs(length) for router in self.routers().values()),
        }

    def routed_projections(self) -> list[RoutedProjection]:
        """Implement `RoutedModule.routed_projections`."""
        return [
            RoutedProjection(
                f"{name.partition('_')[0]}_router",
                (name,),
                "token" if name.endswith("up") else "slot",
                layer.d_in,
                "slot" if name.endswith("up") else "token",
                layer.d_out,
                weighted=False,
            )
            for name, layer in self.expert_layers().items()
        ]

    def transform(
        self, x: Tensor, router_input: Tensor, context: FFNContext
    ) -> tuple[Tensor, dict[str, Routing]]:
        """Implement `FeedForward.transform`."""
        routing = {
            name: router(router_input, context.token_mask, state=context.state.of(name))
            for name, router in self.routers().items()
        }
        g1, g2 = (_of_heads(decided, x) for decided in routing.values())
        plan1, plan2 = (
            self.dispatcher.plan(decided, self.config.router.num_experts)
            for decided in routing.values()
        )
        gathered = context.gathered
        rows = x.flatten(0, 1)
        rows = F.pad(rows, (0, 1), value=1.0) if self.config.bias else rows
        a1 = self._up("first_up", plan1, rows, gathered)
        if self.is_vertical:
            a2 = self._up("second_up", plan2, rows, gathered)
            of_first, of_second = g1 @ a1, g2 @ a2  # [T, H, m / 2]
            upper = torch.cat([a1 * g1.sum(1)[:, :, None], g1.mT @ of_second], 2)
            lower = torch.cat([g2.mT @ of_first, a2 * g2.sum(1)[:, :, None]], 2)
            parts = [
                self._down("first_down", plan1, upper, g1, gathered),
                self._down("second_down", plan2, lower, g2, gathered),
            ]
            y = torch.cat(parts, -1)
        else:
            y = self._down("second_down", plan2, g2.mT @ (g1 @ a1), g2, gathered)
        return y.view_as(x), routing

    def _up(self, name: str, plan: DispatchPlan, rows: Tensor, gathered: Gathered) -> Tensor:
        """[T, D] -> hidden units of each half that a token takes, [T, N, width]; else zero."""
        experts = self.expert_weights(name, gathered=gathered)
        sent = plan.dispatch(rows, "token")
        hidden = plan.run_and_combine(experts, sent, "token", "slot", weighted=False).wait()
        return self.activation(hidden.unflatten(0, (len(rows), -1)))

    def _down(
        self, name: str, plan: DispatchPlan, hidden: Tensor, gates: Tensor, gathered: Gathered
    ) -> Tensor:
        """Weighed hidden units [T, N, m] and their weights [T, H, N] -> [T, output width]."""
        if self.config.bias:
            hidden = torch.cat([hidden, gates.sum(1)[:, :, None]], 2)
        experts = self.expert_weights(name, gathered=gathered)
        sent = plan.dispatch(hidden.flatten(0, 1), "slot")
        return plan.run_and_combine(experts, sent, "slot", "token", weighted=False).wait()


def _of_heads(routing: Routing, x: Tensor) -> Tensor:
    """Return the weights [T, H, N] of a router's choice, in the type of `x`."""
    assert routing.head_weights is not None
    return routing.head_weights[:, 0].to(x.dtype)
