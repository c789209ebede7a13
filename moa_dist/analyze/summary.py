"""An analysis as a few lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from moa_dist.analyze.headline import headline
from moa_dist.analyze.panels import router_title
from moa_dist.analyze.results import Analysis, LayerHeads, RouterResult, TokenOfExpert

_EXPERTS, _TOKENS = 3, 8
"""Shown of each router, and of each of these experts."""


def summary(analysis: Analysis) -> str:
    """What a person wants to know first."""
    lines = [
        f"{analysis.name}, step {analysis.step:,}: {analysis.tokens:,} tokens of {analysis.data}"
    ]
    for router in analysis.routers:
        lines += ["", router_title(router), *(f"  {line}" for line in router_lines(router))]
        lines += [f"  {line}" for line in _specific_experts(router)]
    lines += ["", "heads", *(f"  {line}" for line in _heads(analysis.attention))]
    return "\n".join(lines)


def router_lines(router: RouterResult) -> Iterator[str]:
    """About one router, in words."""
    numbers = headline(router)
    yield (
        f"{router.num_experts} experts, {router.choices} of them per token; fullest "
        f"{numbers.imbalance:.2f} x mean; {numbers.dead} never chosen; {numbers.dropped:.1%} of "
        "choices dropped"
    )
    yield (
        f"the token alone tells {numbers.explained:.1%} of what could be told of its experts, by "
        f"{router.num_frequent:,} frequent ones"
    )
    if depth := numbers.depth:
        yield (
            f"{depth.overlap:.1%} of a token's experts come again in another repeat "
            f"({depth.chance:.1%} by chance)"
        )
        yield (
            f"{depth.single_repeat:.1%} of the experts serve one repeat almost only; a token uses "
            f"{depth.distinct:.1f} different ones in all repeats, of at most {depth.most_distinct}"
        )


def named(tokens: list[TokenOfExpert]) -> str:
    """Tokens so that spaces and line ends show."""
    return "  ".join(token.text.replace(" ", "␣").replace("\n", "⏎") for token in tokens)


def _specific_experts(router: RouterResult) -> Iterator[str]:
    """Those whose tokens are least shared with other experts."""

    def mean_pmi(expert: int) -> float:
        tokens = router.top_tokens[expert]
        return sum(token.pmi for token in tokens) / len(tokens) if tokens else 0.0

    experts = sorted(range(router.num_experts), key=mean_pmi, reverse=True)[:_EXPERTS]
    for expert in experts:
        if tokens := router.top_tokens[expert][:_TOKENS]:
            yield f"expert {expert}: {named(tokens)}"


def _heads(layers: list[LayerHeads]) -> Iterator[str]:
    found = [
        (head, f"{layer.title} head {number}")
        for layer in layers
        for number, head in enumerate(layer.heads)
        if head.queries
    ]
    if not found:
        return
    near, far = (pick(found, key=lambda item: item[0].distance) for pick in (min, max))
    yield f"nearest {near[1]}: {near[0].distance:.1f} tokens away on average"
    yield f"farthest {far[1]}: {far[0].distance:.1f} tokens"
    for name, what in (("previous", "the token before"), ("first", "the first token")):
        head, where = max(found, key=lambda item: getattr(item[0], name))
        yield f"most attention to {what}: {where}, {getattr(head, name):.1%}"
