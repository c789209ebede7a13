"""What dense models can be upcycled to; see `transfer.upcycle`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moa_dist.config.attention import DenseAttentionConfig, MoAConfig, SwitchHeadConfig
from moa_dist.config.family import MoHConfig
from moa_dist.config.feed_forward import DenseFFNConfig, MoEFFNConfig
from moa_dist.config.model import ModelConfig
from moa_dist.config.parts import PARTS, PartConfig
from moa_dist.errors import Problem

_HEADS_FIELD: dict[type[PartConfig], str | None] = {
    MoAConfig: "heads_per_expert",
    MoHConfig: "heads_per_expert",
    SwitchHeadConfig: "num_heads",
    MoEFFNConfig: None,
}
"""Kinds that a dense part can be upcycled to, with the field of the number of heads, if any."""


def problems_of(
    dense: ModelConfig, config: ModelConfig, others: Sequence[ModelConfig] = ()
) -> Iterator[Problem]:
    """Yield each reason why `dense`, or it and `others`, cannot be upcycled to `config`."""
    for name in ModelConfig.model_fields:
        if any(getattr(other, name) != getattr(dense, name) for other in others):
            text = f"the dense models differ in `model.{name}`; upcycle models of one architecture"
            yield Problem(text, (f"model.{name}",))
    num_models = 1 + len(others)
    for name in ModelConfig.model_fields:
        before, now = getattr(dense, name), getattr(config, name)
        if name not in PARTS and before != now:
            now, before = ("null" if value is None else value for value in (now, before))
            text = f"`model.{name}` is {now}, but {before} in the dense model; make them equal"
            yield Problem(text, (f"model.{name}",), {f"model.{name}": [getattr(dense, name)]})
    if config.sharing.is_partial:
        yield Problem(
            "`model.sharing` shares layers by part, which cannot be upcycled; upcycle a model with "
            "distinct layers, and share them with `moa-dist share`",
            ("model.sharing",),
        )
    changed = [name for name in PARTS if getattr(dense, name) != getattr(config, name)]
    if not changed:
        text = (
            "`model.attention` and `model.ffn` equal those of the dense model: nothing to upcycle"
        )
        yield Problem(text, ("model.attention", "model.ffn"))
    for name in changed:
        before, now = getattr(dense, name), getattr(config, name)
        if before.kind != "dense":
            yield Problem(
                f"`model.{name}` of the run is {before.kind}, but only dense layers can be "
                "upcycled; keep its settings unchanged",
                (f"model.{name}",),
                {f"model.{name}": [before]},
            )
        elif now.kind == "dense":
            yield Problem(
                f"`model.{name}` is dense, but its settings differ from the run's; keep them "
                "unchanged, or choose a kind with experts",
                (f"model.{name}",),
                {f"model.{name}": [before]},
            )
        elif type(now) not in _HEADS_FIELD:
            kinds = [str(kind.model_fields["kind"].default) for kind in _HEADS_FIELD]
            yield Problem(
                f"`model.{name}.kind` is {now.kind}, which a dense part cannot be upcycled to; use "
                + ", ".join(kinds),
                (f"model.{name}.kind",),
                {f"model.{name}.kind": kinds},
            )
        of_known_kind = now.routers if type(now) in _HEADS_FIELD else {}
        for field, router in of_known_kind.items():
            if router.kind != "topk":
                key = f"model.{name}.{field}.kind"
                text = f"`{key}` is {router.kind}, but an upcycled part needs topk"
                yield Problem(text, (key,), {key: ["topk"]})
    if "attention" in changed and isinstance(dense.attention, DenseAttentionConfig):
        yield from _attention_problems(dense.attention, config, num_models)
    if isinstance(dense.ffn, DenseFFNConfig) and isinstance(config.ffn, MoEFFNConfig):
        yield from _ffn_problems(dense.ffn, config.ffn, num_models)


def _attention_problems(
    dense: DenseAttentionConfig, config: ModelConfig, num_models: int
) -> Iterator[Problem]:
    attention = config.attention
    heads = _HEADS_FIELD.get(type(attention))
    if heads is None:
        return
    if dense.kv_heads < dense.num_heads or dense.qk_norm:
        yield Problem(
            "attention of the dense model shares keys and values among heads, or normalizes them; "
            "neither can be upcycled",
            ("model.attention",),
        )
    wanted = {
        heads: dense.num_heads,
        "d_head": dense.d_head,
        "rope": dense.rope,
        "window": dense.window,
        "soft_cap": dense.soft_cap,
        "qk_norm": False,
        "shared_experts": 0,
        "attend": "softmax",
        "relative_positions": None,
        "num_shared_heads": 0,
        "bias": False,
    }
    yield from _routing_problems("model.attention", attention)
    for name, router in attention.routers.items():
        if router.num_experts % num_models:
            key = f"model.attention.{name}.num_experts"
            text = f"`{key}` is {router.num_experts}, but must be a multiple of {num_models} models"
            yield Problem(text, (key,))
    for name, value in wanted.items():
        if getattr(attention, name, value) != value:
            yield Problem(
                f"`model.attention.{name}` is {getattr(attention, name)}; copies of the dense "
                f"attention need {value}",
                (f"model.attention.{name}",),
                {f"model.attention.{name}": [value]},
            )


def _routing_problems(path: str, part: PartConfig) -> Iterator[Problem]:
    """Copies must add up to what they are copies of."""
    for name, router in part.routers.items():
        for field, value in (("route_scale", 1.0), ("group_limit", None)):
            if getattr(router, field) != value:
                key = f"{path}.{name}.{field}"
                yield Problem(
                    f"`{key}` is set, but copies of a dense part need "
                    f"{'null' if value is None else value}",
                    (key,),
                    {key: [value]},
                )


def _ffn_problems(dense: DenseFFNConfig, ffn: MoEFFNConfig, num_models: int) -> Iterator[Problem]:
    yield from _routing_problems("model.ffn", ffn)
    if ffn.shared_expert is not None:
        yield Problem(
            "`model.ffn.shared_expert` is set, but the dense FFN is copied into the routed experts",
            ("model.ffn.shared_expert",),
            {"model.ffn.shared_expert": [None]},
        )
    for whose, has_bias in (("the dense model", dense.bias), ("the new model", ffn.bias)):
        if has_bias:
            yield Problem(
                f"`model.ffn.bias` is true in {whose}, but FFNs with biases cannot be upcycled",
                ("model.ffn.bias",),
                {"model.ffn.bias": [False]},
            )
    for name in ("activation", "gated"):
        if getattr(ffn, name) != getattr(dense, name):
            yield Problem(
                f"`model.ffn.{name}` is {getattr(ffn, name)}, but {getattr(dense, name)} in the "
                "dense model; make them equal",
                (f"model.ffn.{name}",),
                {f"model.ffn.{name}": [getattr(dense, name)]},
            )
    slices, rest = divmod(dense.d_ff, ffn.d_expert)
    if rest or ffn.router.num_experts % (slices * num_models):
        whose = "an FFN" if num_models == 1 else f"{num_models} FFNs"
        multiple = "m" if num_models == 1 else f"{num_models} m"
        yield Problem(
            f"`model.ffn`: {ffn.router.num_experts} experts of width {ffn.d_expert} are not whole "
            f"copies of {whose} of width {dense.d_ff}; choose `d_expert` so that {dense.d_ff} = "
            f"m x `d_expert`, and `router.num_experts` as a multiple of {multiple}",
            ("model.ffn.d_expert", "model.ffn.router.num_experts"),
        )
