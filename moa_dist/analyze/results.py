"""What an analysis found: `analysis.json`, from which pictures and pages are made.

Shapes, as nested lists: R repeats of a layer, E experts of all groups of a router, H heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from moa_dist.errors import DataError

ANALYSIS_FOLDER = "analysis"
"""In the run's folder."""
ANALYSIS_FILE = "analysis.json"

_MOST = 2**53
"""Far beyond any count, and arithmetic up to there is exact."""
Count = Annotated[int, Field(ge=0, le=_MOST)]
Some = Annotated[int, Field(ge=1, le=_MOST)]
Number = Annotated[float, Field(ge=-_MOST, le=_MOST)]
Table = list[list[Count]]


class _Result(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TokenOfExpert(_Result):
    """A token that an expert is chosen by more often than by others."""

    token: Count
    """Its id."""
    text: str
    """What it stands for."""
    pmi: Number
    """log p(token, expert) / (p(token) p(expert)), nats."""
    share: Number
    """Of all applications of the layer to this token, those in which it chose the expert."""
    count: Some
    """Choices of the expert by this token, over all repeats."""


class RouterResult(_Result):
    """What one router chose."""

    layer: Count
    """Distinct layer."""
    router: str
    """Within the layer, such as `ffn`."""
    num_groups: Some
    """Heads in SwitchHead, else 1; each has as many of the E experts."""
    choices: Some
    """Experts that a token chooses in one repeat, over all groups."""
    num_tokens: Count
    """Tokens routed in each repeat."""
    load: Annotated[Table, Field(min_length=1)]
    """[R][E] choices of each expert."""
    dropped: Table
    """[R][E] choices that capacity left no room for."""
    together: Table
    """[E][E] decisions (of a token in one repeat) for both experts; the diagonal, for the one."""
    common: Table
    """[R][R] experts that a token chose in both repeats, summed over tokens."""
    distinct: list[Count]
    """Tokens, by the number of different experts that they chose over all repeats."""
    num_frequent: Count
    """Tokens of the vocabulary that occur often enough for the following."""
    information: Number
    """Mutual information between frequent tokens and the experts they choose, nats."""
    most_information: Number
    """What that would be if a token always chose the same experts: the entropy of all choices less
    that of one decision, nats."""
    top_tokens: list[list[TokenOfExpert]]
    """[E] the tokens of highest PMI, best first."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        R, E = len(self.load), len(self.load[0])
        shapes = ((self.load, R, E), (self.dropped, R, E), (self.together, E, E))
        for table, rows, columns in (*shapes, (self.common, R, R)):
            if len(table) != rows or any(len(row) != columns for row in table):
                raise ValueError("its tables do not fit each other")
        if not E or E % self.num_groups or len(self.top_tokens) != E:
            raise ValueError("its experts do not fit its groups")
        return self

    @property
    def num_repeats(self) -> int:
        """R."""
        return len(self.load)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.load[0])

    @property
    def load_RE(self) -> NDArray[np.int64]:
        """`load` as an array."""
        return np.array(self.load, dtype=np.int64)


class HeadResult(_Result):
    """Where one head looks: means over its queries, each sequence's first token left out."""

    queries: Count
    """Queries; in MoA, those of tokens that chose its expert."""
    distance: Number
    """Mean distance to the keys, tokens."""
    entropy: Number
    """Of the attention, nats."""
    previous: Number
    """Attention to the token before."""
    first: Number
    """Attention to the first token of the sequence."""
    itself: Number
    """Attention to the token itself."""


class LayerHeads(_Result):
    """The heads of an attention in one application of a layer."""

    layer: Count
    """Distinct layer."""
    repeat: Count
    """Application of that layer."""
    attention: str
    """Within the layer: `attention`, or `attention.cross` for that of a decoder to the source."""
    heads: Annotated[list[HeadResult], Field(min_length=1)]
    """[H]; in MoA, all heads of expert 0, then those of expert 1 ..."""

    @property
    def title(self) -> str:
        """Such as `L0 R1`, or `L2 R0 cross`."""
        cross = " cross" if self.attention == "attention.cross" else ""
        return f"L{self.layer} R{self.repeat}{cross}"


class Analysis(_Result):
    """Everything that was found about a checkpoint."""

    name: str
    """Of the run."""
    step: Count
    """Optimizer steps that the model was trained for."""
    data: str
    """Folder of the text."""
    tokens: Count
    """Tokens of text that the model read."""
    sequence_length: Some
    """Tokens per sequence."""
    min_count: Some
    """Tokens that occur less often are left out of `top_tokens` and `information`."""
    routers: list[RouterResult]
    """By layer, then router."""
    attention: list[LayerHeads]
    """In the order in which they are applied."""

    @model_validator(mode="after")
    def _layers_are_alike(self) -> Self:
        if len({len(layer.heads) for layer in self.attention}) > 1:
            raise ValueError("its layers have unequal numbers of heads")
        return self


def save_analysis(analysis: Analysis, folder: Path) -> None:
    """Write `analysis.json` into `folder`."""
    (folder / ANALYSIS_FILE).write_text(analysis.model_dump_json(), encoding="utf-8")


def load_analysis(folder: Path) -> Analysis | None:
    """Read it back; None if there is none. Raises DataError if it is damaged."""
    path = folder / ANALYSIS_FILE
    try:
        return Analysis.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: damaged: {where}: {first['msg']}; run moa-dist analyze again"
        ) from error
