"""Asks the papers' claims again on a CPU: equal data, equal tokens, tuned alike.

    moa-dist prepare --input BOOKS --output data/comparison/train --documents blank-line \
        --vocab-size 2048 --sequence-length 256
    moa-dist prepare --input OTHER_BOOKS --output data/comparison/valid --documents blank-line \
        --tokenizer data/comparison/train/tokenizer.json --sequence-length 256
    moa-dist prepare --pairs train.en train.de --output data/multi30k/train \
        --vocab-size 8000 --sequence-length 128
    moa-dist prepare --pairs val.en val.de --output data/multi30k/valid \
        --tokenizer data/multi30k/train --sequence-length 128
    (and other pairs alike into data/manuals)
    python -m tests.benchmarks.claims [QUESTION | MODEL ...] [--steps N] [--table]

Every model tries its learning rates with seed 0, on a small part of the budget, half of which is
the warm-up of the whole, or on all of it; then it trains with the best rate for the whole budget,
with one or more seeds (`contenders.py` lists models by question). That takes hours, and resumes
after an interruption. `--steps` makes the budget smaller, `--table` only prints results, which
`tests/benchmarks/README.md` has.
"""
