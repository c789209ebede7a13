"""Adapts trained models to lm-evaluation-harness (the extra `eval`).

To run the harness's own command with the model `moa_dist` registered:

    python -m moa_dist.evaluate.harness run --model moa_dist --model_args path=runs/one --tasks piqa

In Python: `lm_eval.simple_evaluate(HarnessModel(model, scorer), tasks=["piqa"])`. Log-likelihoods
come from the scorer of `moa-dist eval`, so every sequence starts with the end-of-document token,
which the harness's own models put only before an empty context.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import simple_parse_args_string
except ImportError as error:
    raise ImportError(
        "lm-evaluation-harness is not installed: pip install 'moa-dist[eval]'"
    ) from error

from moa_dist.errors import DataError, MoaDistError
from moa_dist.evaluate.generate import generate, stream_text
from moa_dist.evaluate.sampling import Sampling
from moa_dist.evaluate.scoring import Request, Scorer, scorer_of
from moa_dist.evaluate.trained import load_trained, require
from moa_dist.models.language_model import LanguageModel

_MICRO_BATCH = 8


@register_model("moa_dist")
class HarnessModel(LM):
    """Answers the harness's three kinds of requests, on one process."""

    def __init__(self, model: LanguageModel, scorer: Scorer) -> None:
        super().__init__()
        self.model = model
        self.scorer = scorer

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        """Create from `--model_args path=RUN_OR_CHECKPOINT` and `--batch_size N`.

        Raises DataError if there are other arguments, or the model does not exist or is not causal.
        """
        if arg_dict.keys() != {"path"}:
            raise DataError(
                f"--model_args has {', '.join(arg_dict) or 'no arguments'}; give one, "
                "path=FOLDER of a run, a checkpoint or an export",
                key="--model_args",
            )
        batch = str((additional_config or {}).get("batch_size"))
        micro_batch = int(batch) if batch.isdecimal() else _MICRO_BATCH  # it may be `auto`
        trained = load_trained(Path(str(arg_dict["path"])))
        require(trained, "causal", "lm-evaluation-harness")
        return cls(trained.model, scorer_of(trained, micro_batch))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        """Create from `--model_args` as text; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-likelihoods of continuations in nats, and whether each is greedy."""
        scores = self.scorer.score([Request(*request.args) for request in requests])
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihoods of documents in nats, scoring each token exactly once."""
        scores = self.scorer.score([Request("", *request.args) for request in requests])
        return [score.log_likelihood for score in scores]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate continuations up to the first stop sequence, which is not included."""
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        tokenizer, chosen = self.scorer.tokenizer, normalize_gen_kwargs(options)
        prompt = tokenizer.encode(context)
        drawn = generate(
            self.model,
            [[tokenizer.end_of_document, *prompt]],
            Sampling(
                temperature=chosen.get("temperature", 0.0),
                top_k=chosen.get("top_k") or None,  # Hugging Face's 0 is all
                top_p=chosen.get("top_p", 1.0),
            ),
            max_new_tokens=chosen["max_gen_toks"],
            seed=0,
            end_of_document=tokenizer.end_of_document,
            max_length=self.scorer.max_length,
            document_attention=self.scorer.document_attention,
        )
        text = ""
        for _, piece in stream_text(tokenizer, drawn, [prompt]):
            text += piece
            found = [at for stop in chosen["until"] if stop and (at := text.find(stop)) >= 0]
            if found:
                return text[: min(found)]
        return text


def main() -> int:
    """Run the harness's own command; return the exit status."""
    try:
        cli_evaluate()
    except MoaDistError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
