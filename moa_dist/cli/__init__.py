"""Subcommands of `moa-dist`: each module parses arguments with argparse and prints results.

Why not a library: `evaluate` and `plan_cluster`, over 200 lines, lay out results only we have.
"""
