#!/usr/bin/env bash
# Test docker/ without a daemon, a registry or privileges in the image:
#
#     bash tests/cluster/image.sh [PYTEST ARGUMENTS]
#
# buildah builds the CPU image twice, on a base made by debootstrap, and both builds must contain the
# same packages. The quickstart, the test command (the whole suite, or what the arguments select) and
# the two containers of docker/compose.yaml then run as the image's own user; the containers have a
# separate network, and experts are sharded between them. Needs root on Debian, network access, 15 GB
# of disk and half an hour. Everything except Debian packages and the base is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."

export BUILDAH_ISOLATION=chroot BUILDER=buildah # STORAGE_DRIVER=vfs where overlays cannot be mounted
base=localhost/base:bookworm
work=$(mktemp -d)
containers=() images=() bridge=moa-image
secret=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')

say() { printf '\n== %s\n' "$*"; }

clean_up() {
    set +e # not everything may have been created
    for node in text node0 node1; do
        ip netns pids "$bridge-$node" 2>/dev/null | xargs --no-run-if-empty kill
    done
    wait
    for container in "${containers[@]}"; do buildah rm "$container" >/dev/null; done
    for image in "${images[@]}"; do buildah rmi --force "$image" >/dev/null 2>&1; done
    for node in text node0 node1; do ip netns delete "$bridge-$node" 2>/dev/null; done
    ip link delete "$bridge" 2>/dev/null
    rm -rf "$work"
}
trap clean_up EXIT

make_base() {
    buildah images --quiet "$base" >/dev/null 2>&1 && return
    local container
    debootstrap --variant=minbase bookworm "$work/root" >/dev/null
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/root" / >/dev/null
    buildah commit --quiet --rm "$container" "$base" >/dev/null
    rm -rf "$work/root"
}

# Copy pip's settings of this machine, with the files and folders that they name, for the build only.
configure_pip() {
    mkdir "$work/pip"
    mapfile -t build_arguments < <(python3 - "$work" <<'PYTHON'
import ast, shutil, subprocess, sys
from pathlib import Path

work = Path(sys.argv[1])
listed = subprocess.run(
    [sys.executable, "-m", "pip", "config", "list"], check=True, stdout=subprocess.PIPE, text=True
)
settings = {}
for line in sorted(listed.stdout.splitlines(), reverse=True):  # the environment's last
    name, _, value = line.partition("=")
    settings[name.rpartition(".")[2]] = ast.literal_eval(value)
folders = []
for key in ("find-links", "index-url", "extra-index-url"):
    for word in settings.get(key, "").split():
        folder = word.removeprefix("file://").removesuffix("/simple")
        folders += [folder] if folder.startswith("/") else []
if "cert" in settings:
    shutil.copyfile(settings["cert"], work / "pip/cert")
    settings["cert"] = "/mnt/pip/cert"
wanted = ("find-links", "index-url", "extra-index-url", "cert", "proxy", "trusted-host")
lines = [f"{key} = {settings[key]}\n" for key in wanted if key in settings]
(work / "pip.conf").write_text("".join(["[global]\n", *lines]))
print("--secret", f"id=pip,src={work}/pip.conf", "--volume", f"{work}/pip:/mnt/pip:ro", sep="\n")
for folder in dict.fromkeys(folders):
    print("--volume", f"{folder}:{folder}:ro", sep="\n")
PYTHON
    )
}

# build TAG ARGUMENTS
build() {
    images+=("$1")
    TAG=$1 bash docker/build.sh cpu --build-arg "BASE=$base" "${build_arguments[@]}" "${@:2}" \
        >"$work/build.log" 2>&1 || { tail -n 50 "$work/build.log" >&2 && return 1; }
}

# start TAG: a container, whose name is then in $container
start() {
    container=$(buildah from "$1")
    containers+=("$container")
}

# inside COMMAND: in $container, as the image's user
inside() { buildah run "$container" -- "$@"; }

add_network() {
    local node number=0
    ip link add "$bridge" type bridge
    ip link set "$bridge" up
    for node in "$@"; do
        number=$((number + 1))
        ip netns add "$bridge-$node"
        ip link add "$bridge-$number" type veth peer name eth0 netns "$bridge-$node"
        ip link set "$bridge-$number" master "$bridge" up
        ip -n "$bridge-$node" link set lo up
        ip -n "$bridge-$node" address add "10.213.0.$number/24" dev eth0
        ip -n "$bridge-$node" link set eth0 up
        echo "10.213.0.$number $node" >>"$work/hosts"
    done
    echo "127.0.0.1 localhost" >>"$work/hosts"
}

# service NAME [CONFIGURATION]: run a service of the compose file in a container with its own network
service() {
    local -a command
    mapfile -d '' -t command < <(inside python -c '
import sys, yaml
services = yaml.safe_load(open("docker/compose.yaml"))["services"]
print(*services[sys.argv[1]]["command"], sep="\0", end="\0")' "$1")
    ip netns exec "$bridge-$1" buildah run --hostname "$1" --no-hosts \
        --env MOA_DIST_JOB_SECRET="$secret" \
        --volume "$work/hosts:/etc/hosts:ro" \
        --volume "$work/data:/app/data" --volume "$work/runs:/app/runs" \
        "$container" -- docker/entrypoint.sh "${command[@]//\$\$/$}" "${@:2}"
}

missing=()
for tool in buildah debootstrap ip; do command -v "$tool" >/dev/null || missing+=("${tool/#ip/iproute2}"); done
[ ${#missing[@]} -eq 0 ] || { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >/dev/null
configure_pip
make_base

say "build twice, and compare the contents of the images"
build moa-dist:first --layers
build moa-dist:second --no-cache
for image in first second; do
    start "moa-dist:$image"
    inside cat image.json >"$work/$image.json"
done
cmp "$work/first.json" "$work/second.json"
echo "$(grep --count '^  "' "$work/first.json") packages, Python and base: identical in both builds"
inside moa-dist doctor
buildah inspect --format '{{.OCIv1.Config.User}} {{.OCIv1.Config.Labels}}' "$container"
[ "$(inside id --user)" = 10001 ]

say "the quickstart, in the image"
inside bash launcher/quickstart.sh
inside moa-dist checkpoint show runs/quickstart | tee "$work/shown"
grep --quiet "image cpu on $base" "$work/shown"

say "two containers of docker/compose.yaml, experts sharded between them"
mkdir "$work/data" "$work/runs"
chown 10001:10001 "$work/data" "$work/runs"
add_network text node0 node1
start moa-dist:first
service text
start moa-dist:first
service node1 train.steps=20 >"$work/node1.log" 2>&1 &
other=$!
start moa-dist:first
service node0 train.steps=20
wait "$other" || { cat "$work/node1.log" && exit 1; }

say "the tests, in the image"
build moa-dist:test --layers --target test
start moa-dist:test
inside bash tests/run.sh "$@"

say "passed: two identical builds; quickstart, two containers and tests exit with 0"
