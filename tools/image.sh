#!/bin/sh
# Builds the container image with podman, buildah or docker, whichever works here. docs/packaging.md says how.
#
#   TARGET  runtime (default) or dev        BASE  another base image, e.g. pinned by digest
#   TAG     the image's name                ENGINE  podman, buildah or docker, and arguments of its own
#   CA      a certificate bundle for a proxy that re-signs TLS        PIP_CONF  a pip.conf, for a mirror
set -eu
cd "$(dirname "$0")/.."

target=${TARGET:-runtime}
tag=${TAG:-token-custody-sidecar:$target}

refuse() {
    printf 'image: %s\n' "$1" >&2
    exit 1
}

# The docker command is often there without an engine behind it, so it has to prove that it reaches one.
works() {
    command -v "$1" >/dev/null && "$1" info >/dev/null 2>&1
}

choose() {
    for candidate in podman buildah docker; do
        if works "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

engine=${ENGINE:-$(choose)}
[ -n "$engine" ] || refuse "no podman, buildah or docker works here. Install one (apt-get install podman), or name one: make image ENGINE=…"

set -- --target "$target" --tag "$tag" --file Dockerfile
[ -z "${BASE:-}" ] || set -- "$@" --build-arg "BASE=$BASE"
[ -z "${CA:-}" ] || set -- "$@" --secret "id=ca,src=$CA"
[ -z "${PIP_CONF:-}" ] || set -- "$@" --secret "id=pip,src=$PIP_CONF"

# ENGINE may hold arguments (podman --root …), so it is split into words.
# shellcheck disable=SC2086
$engine build "$@" .
printf 'image: built %s\n' "$tag"
