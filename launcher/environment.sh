# Sourced by quickstart.sh and tests/run.sh. `make_environment [EXTRAS]` creates .venv in the
# repository and installs the package in it. It does nothing if both are up to date, or in a
# container image, where the packages are installed already.

make_environment() {
    local extras="${1:-}" python="${PYTHON:-python3}" stamp
    [ -z "${MOA_DIST_IMAGE:-}" ] || return 0
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "Python 3.11 or newer is required, but '$python' is older or missing: set PYTHON." >&2
        return 1
    fi
    stamp=".venv/installed$extras-$(cksum <pyproject.toml | cut -d' ' -f1)"
    [ -e "$stamp" ] && return
    echo "Installing into .venv (once; this needs network access and a few minutes) ..."
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$extras"
    touch "$stamp"
}
