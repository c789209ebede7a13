#!/bin/sh
# Options go to the launcher, which trains on this node's devices; anything else is a command.
set -eu

case "${1:-}" in
-*) exec python /app/launcher/launch.py "$@" ;;
esac
exec "$@"
