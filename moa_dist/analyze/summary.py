"""Summarizes an analysis in a few lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from moa_dist.analyze.headline import headline
from moa_dist.analyze.panels import router_title
from moa_dist.analyze.results import Analysis, LayerHeads, RouterResult, TokenOfExpert

_EXPERTS, _TOKENS = 3, 8
"""Experts shown per router, and tokens shown per expert."""


def summary(analysis: Analysis) -> str:
    """Return the most important results as text."""
    lines = [
        f"{analysis.name}, step {analysis.step:,}: {analysis.tokens:,} tokens of {analysis.data}"
    ]
    for router in analysis.routers:
        lines += ["", router_title(router), *(f"  {line}" for line in router_lines(router))]
        lines += [f"  {line}" for line in _specific_experts(router)]
    for text, tokens in analysis.depths.items():
        lines += ["", f"depth, {text}", f"  {_depth(tokens)}"]
    for name, mean in analysis.token_means.items():
        if "state_norm/" in name:
            call = name.replace("state_norm/", "")
            lines.append(f"{call}: hands on a state of norm {mean:.3f}, a mean over tokens")
    lines += ["", "heads", *(f"  {line}" for line in _heads(analysis.attention))]
    return "\n".join(lines)


def router_lines(router: RouterResult) -> Iterator[str]:
    """Describe one router in a few lines."""
    numbers = headline(router)
    yield (
        f"{router.num_experts} experts, {router.choices} per token; maximum load "
        f"{numbers.imbalance:.2f} x mean; {numbers.dead} never chosen; {numbers.dropped:.1%} of "
        "choices dropped"
    )
    yield (
        f"{numbers.explained:.1%} of the choice of experts explained by token identity "
        f"({router.num_frequent:,} frequent tokens)"
    )
    if depth := numbers.depth:
        yield (
            f"{depth.overlap:.1%} of a token's experts reused across repeats "
            f"({depth.chance:.1%} expected at random)"
        )
        yield (
            f"{depth.single_repeat:.1%} of the experts used almost only in one repeat; a token "
            f"uses {depth.distinct:.1f} distinct experts over all repeats, of at most "
            f"{depth.most_distinct}"
        )


def _depth(tokens: list[int]) -> str:
    """Describe how many applications tokens take, given their numbers by that."""
    total = max(sum(tokens), 1)
    taken = sum(depth * number for depth, number in enumerate(tokens)) / total
    return (
        f"a token takes {taken:.2f} of {len(tokens) - 1} applications of layers on average; "
        f"{tokens[-1] / total:.1%} of tokens take all"
    )


def named(tokens: list[TokenOfExpert]) -> str:
    """Join the texts of tokens with spaces and line ends made visible."""
    return "  ".join(token.text.replace(" ", "␣").replace("\n", "⏎") for token in tokens)


def _specific_experts(router: RouterResult) -> Iterator[str]:
    """Yield the top tokens of the experts with the highest mean PMI."""

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
    yield f"farthest {far[1]}: {far[0].distance:.1f} tokens away on average"
    for name, what in (("previous", "the previous token"), ("first", "the first token")):
        head, where = max(found, key=lambda item: getattr(item[0], name))
        yield f"most attention to {what}: {where}, {getattr(head, name):.1%}"
