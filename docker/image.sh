#!/bin/sh
# Builds the image of this commit and pushes it, with docker, podman or buildah, whichever is there. `make build push`.
#
#   REGISTRY          where it goes, e.g. ghcr.io/me; its name is $REGISTRY/latent-gpt
#   BASE              the image with Python it stands on
#   CA                file with the certificates of the package index, where those are your company's own
#   BUILDER           one of the three
#   BUILD_FLAGS       for `build`, e.g. --isolation oci
#   PUSH_FLAGS        for `push`, e.g. --tls-verify=false
#
# What was built is left in build/tag, and what was pushed, by digest, in build/image.
set -eu
cd "$(dirname "$0")/.."
: "${REGISTRY:?say where images go, e.g. REGISTRY=localhost:5000}"
builder=${BUILDER:-}
for one in docker podman buildah; do # a client whose engine does not run is of no use
    [ -n "$builder" ] || { "$one" info >/dev/null 2>&1 && builder=$one; } || true
done
[ -n "$builder" ] || { echo "error: neither docker nor podman nor buildah works here" >&2; exit 2; }
mkdir -p build

case ${1:-} in
build)
    revision=$(git describe --always --dirty 2>/dev/null || echo unknown)
    image=$REGISTRY/latent-gpt:$revision
    # shellcheck disable=SC2086  # flags are words
    "$builder" build ${BUILD_FLAGS:-} --file docker/Dockerfile --target train --tag "$image" \
        ${BASE:+--build-arg "BASE=$BASE"} ${CA:+--secret "id=ca,src=$CA"} --build-arg "REVISION=$revision" .
    echo "$image" >build/tag
    ;;
push)
    [ -s build/tag ] || { echo "error: build/tag is missing, so nothing was built; \`make build\` first" >&2; exit 2; }
    image=$(cat build/tag)
    if [ "$(basename "$builder")" = docker ]; then
        # shellcheck disable=SC2086
        docker push ${PUSH_FLAGS:-} "$image"
        docker inspect --format '{{index .RepoDigests 0}}' "$image" >build/image
    else
        # shellcheck disable=SC2086
        "$builder" push ${PUSH_FLAGS:-} --digestfile build/digest "$image"
        echo "$REGISTRY/latent-gpt@$(cat build/digest)" >build/image
    fi
    cat build/image
    ;;
*)
    echo "usage: $0 build|push" >&2
    exit 2
    ;;
esac
