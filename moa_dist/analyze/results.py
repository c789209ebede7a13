"""Defines the results of an analysis, `analysis.json`, from which plots and pages are made.

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
"""Folder of analyses in the run's folder."""
ANALYSIS_FILE = "analysis.json"

_MOST = 2**53
"""Limit far beyond any count, up to which floating-point arithmetic is exact."""
Count = Annotated[int, Field(ge=0, le=_MOST)]
Some = Annotated[int, Field(ge=1, le=_MOST)]
Number = Annotated[float, Field(ge=-_MOST, le=_MOST)]
Table = list[list[Count]]


class _Result(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TokenOfExpert(_Result):
    """Describes a token that chooses an expert more often than other tokens do."""

    token: Count
    """Id of the token."""
    text: str
    """Text of the token."""
    pmi: Number
    """log p(token, expert) / (p(token) p(expert)), in nats."""
    share: Number
    """Share of the layer's calls on this token in which it chose the expert."""
    count: Some
    """How often the token chose the expert, over all repeats."""


class RouterResult(_Result):
    """Describes the choices of one router."""

    layer: Count
    """Index of the distinct layer."""
    router: str
    """Name within the layer, such as `ffn`."""
    num_groups: Some
    """Number of groups that divide the E experts evenly: heads in SwitchHead, else 1."""
    choices: Some
    """Number of experts that a token chooses in one repeat, over all groups."""
    num_tokens: Count
    """Number of tokens routed in each repeat."""
    load: Annotated[Table, Field(min_length=1)]
    """[R][E] times each expert was chosen."""
    dropped: Table
    """[R][E] choices dropped for lack of capacity."""
    together: Table
    """[E][E] decisions (of a token in one repeat) that chose both experts; on the diagonal, that
    chose the expert."""
    common: Table
    """[R][R] experts that a token chose in both repeats, summed over tokens."""
    distinct: list[Count]
    """Number of tokens by the number of distinct experts that they chose over all repeats."""
    num_frequent: Count
    """Number of vocabulary entries frequent enough for the fields below."""
    information: Number
    """Mutual information between frequent tokens and the experts they choose, in nats."""
    most_information: Number
    """Its upper bound, reached if a token always chooses the same experts: the entropy of all
    choices minus that of one decision, in nats."""
    top_tokens: list[list[TokenOfExpert]]
    """[E] tokens with the highest PMI, best first."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        R, E = len(self.load), len(self.load[0])
        shapes = ((self.load, R, E), (self.dropped, R, E), (self.together, E, E))
        for table, rows, columns in (*shapes, (self.common, R, R)):
            if len(table) != rows or any(len(row) != columns for row in table):
                raise ValueError("the tables do not fit each other")
        if not E or E % self.num_groups or len(self.top_tokens) != E:
            raise ValueError("the experts do not fit the groups")
        return self

    @property
    def num_repeats(self) -> int:
        """Return the number of repeats, R."""
        return len(self.load)

    @property
    def num_experts(self) -> int:
        """Return the number of experts, E."""
        return len(self.load[0])

    @property
    def load_RE(self) -> NDArray[np.int64]:
        """Return `load` as an array."""
        return np.array(self.load, dtype=np.int64)


class HeadResult(_Result):
    """Describes where one head looks: means over queries, excluding each first token.

    First tokens are those of sequences, or of documents where these do not see each other.
    """

    queries: Count
    """Number of queries; in MoA, those of tokens that chose the head's expert."""
    distance: Number
    """Mean distance to the keys, in tokens."""
    entropy: Number
    """Entropy of the attention, in nats."""
    previous: Number
    """Attention to the previous token."""
    first: Number
    """Attention to the first token."""
    itself: Number
    """Attention to the token itself."""


class LayerHeads(_Result):
    """Describes the heads of an attention in one call of a layer."""

    layer: Count
    """Index of the distinct layer."""
    repeat: Count
    """Index of the call of that layer."""
    attention: str
    """Name within the layer: `attention`, or `attention.cross` for a decoder's cross-attention."""
    heads: Annotated[list[HeadResult], Field(min_length=1)]
    """[H] heads; in MoA, all heads of expert 0, then those of expert 1, and so on."""

    @property
    def title(self) -> str:
        """Return a title such as `L0 R1` or `L2 R0 cross`."""
        cross = " cross" if self.attention == "attention.cross" else ""
        return f"L{self.layer} R{self.repeat}{cross}"


class Analysis(_Result):
    """Holds all results of analyzing a checkpoint."""

    name: str
    """Name of the run."""
    step: Count
    """Number of optimizer steps that the model was trained for."""
    data: str
    """Folder of the text."""
    tokens: Count
    """Number of tokens that the model read."""
    sequence_length: Some
    """Tokens per sequence."""
    min_count: Some
    """Minimum occurrences of a token to count in `top_tokens` and `information`."""
    routers: list[RouterResult]
    """Results by layer, then router."""
    attention: list[LayerHeads]
    """Results in order of execution."""
    depths: dict[str, list[Count]] = {}
    """Tokens of the text, and of a source, by the number of applications that they took of the
    layers that tokens leave; empty where all tokens take all."""
    token_means: dict[str, Number] = {}
    """Means over tokens of what layers hand on, such as the norms of routers' recurrent states, by
    name; empty for most models."""

    @model_validator(mode="after")
    def _layers_are_alike(self) -> Self:
        if len({len(layer.heads) for layer in self.attention}) > 1:
            raise ValueError("the layers have unequal numbers of heads")
        return self


def save_analysis(analysis: Analysis, folder: Path) -> None:
    """Write `analysis.json` into `folder`."""
    (folder / ANALYSIS_FILE).write_text(analysis.model_dump_json(), encoding="utf-8")


def load_analysis(folder: Path) -> Analysis | None:
    """Read `analysis.json` from `folder`; None if there is none. Raises DataError if damaged."""
    path = folder / ANALYSIS_FILE
    try:
        return Analysis.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the file", path=path) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: damaged: {where}: {first['msg']}; run moa-dist analyze again",
            path=path,
            key=where,
        ) from error
