"""`moa-dist config`: shows what a configuration resolves to, checks it, explains its fields."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import textwrap

from moa_dist.cli.arguments import add_overrides, between
from moa_dist.config import find_layout_problems, load_config, to_yaml
from moa_dist.config.objective_checks import objective_notes
from moa_dist.config.schema import SchemaField, describe, section_types, walk
from moa_dist.data.notes import data_notes
from moa_dist.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `show`, `check` and `fields`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print the whole configuration, including defaults")
    check = actions.add_parser("check", help="print ok, or every problem")
    actions.add_parser("fields", help="print every field with its type, default and meaning")
    for action in (show, check):
        action.add_argument("path", metavar="CONFIG", help="YAML configuration")
        add_overrides(action)
    check.add_argument(
        "--world-size", type=between(int, 1), metavar="W", help="also check that it fits W ranks"
    )
    check.add_argument(
        "--data", action="store_true", help="also check that the prepared data is here and fits"
    )


def run(args: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit status.

    Raises ConfigError if the configuration is invalid, DataError if its data are, where asked.
    """
    if args.action == "fields":
        print("\n".join(_field_lines(field) for field in walk()))
        return 0
    config = load_config(args.path, args.overrides)
    if args.action == "show":
        print(to_yaml(config), end="")
        return 0
    if args.data:
        from moa_dist.data.check import check_data  # needs torch, which the rest does not

        check_data(
            config.data,
            vocab_size=config.model.vocab_size,
            world_size=args.world_size or 1,
            objective=config.model.objective,
            may_lack_text=True,
        )
    problems = find_layout_problems(config, args.world_size) if args.world_size else []
    if problems:
        raise ConfigError(problems, f"{args.path} on {args.world_size} ranks")
    print(f"{args.path}: ok")
    for note in (*objective_notes(config), *data_notes(config)):
        print(f"note: {note}", file=sys.stderr)
    return 0


def _field_lines(field: SchemaField) -> str:
    where = f" (kind {' and '.join(field.kinds)})" if field.kinds else ""
    head = f"{field.path}{where}: {describe(field.info)}; {_default(field)}"
    body = " ".join(inspect.cleandoc(field.info.description or "").split())
    return head + "\n" + textwrap.indent(textwrap.fill(body, 92), "    ")


def _default(field: SchemaField) -> str:
    if field.info.is_required():
        return "required"
    default = field.info.get_default()
    if section_types(field.info) and default is not None:
        return "optional"
    return f"default {default if isinstance(default, str) else json.dumps(default)}"
