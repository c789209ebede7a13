#!/bin/sh
# Pass options to the launcher, which trains on this node's devices; run anything else as a command.
set -eu

case "${1:-}" in
-*) exec python /app/launcher/launch.py "$@" ;;
esac
exec "$@"
