#!/usr/bin/env bash
# Build an image labeled with the version, the commit and a hash of the sources:
#
#     bash docker/build.sh cpu|cuda [ARGUMENTS OF THE BUILDER]
#
# Useful arguments are --target test, --build-arg BASE=IMAGE, and --secret id=pip,src=pip.conf if pip
# needs a configuration to find packages. BUILDER is docker by default; podman and buildah work as
# well. TAG names the image, by default moa-dist:cpu or moa-dist:cuda.
set -euo pipefail
cd "$(dirname "$0")/.."

variant=${1:-}
if [ ! -e "docker/requirements-$variant.txt" ] || [ "$variant" = test ]; then
    echo "usage: bash docker/build.sh cpu|cuda [ARGUMENTS OF THE BUILDER]" >&2
    exit 2
fi
shift

revision=unknown
if git rev-parse HEAD >/dev/null 2>&1; then
    revision=$(git rev-parse HEAD)
    [ -z "$(git status --porcelain)" ] || revision+=+changes
fi
source=$(python3 -B -c 'from moa_dist.provenance import code_hash; print(code_hash())')
version=$(python3 -B -c 'import moa_dist; print(moa_dist.__version__)')

exec "${BUILDER:-docker}" build --file docker/Dockerfile --tag "${TAG:-moa-dist:$variant}" \
    --build-arg "VARIANT=$variant" --build-arg "VERSION=$version" \
    --build-arg "REVISION=$revision" --build-arg "SOURCE=$source" "$@" .
