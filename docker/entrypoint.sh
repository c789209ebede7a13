#!/bin/sh
# Arguments that begin with --config train on this node's devices; all others are a command.
set -eu

case "${1:-}" in
--config | --config=*)
    exec deepspeed "$(dirname "$0")/../launcher/train.py" "$@"
    ;;
esac
exec "$@"
