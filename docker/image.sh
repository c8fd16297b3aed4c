#!/bin/sh
# Builds both images and pushes them, with docker, podman or buildah, whichever is there. `make build push`.
#
#   REGISTRY          where they go, e.g. ghcr.io/me; their names are $REGISTRY/latent-gpt and …/latent-gpt-mlflow
#   BASE              the image with Python they stand on, by name or by digest
#   TORCH_INDEX       a package index with torch's wheels for CPUs: no CUDA, and 4 GB less
#   CA                file with the certificates of the package index, where those are your company's own
#   BUILDER           one of the three
#   BUILD_FLAGS       for `build`, e.g. --isolation oci
#   PUSH_FLAGS        for `push`, e.g. --tls-verify=false
#
# What was built is left in build/tag and build/tag-mlflow, what is in it in build/sbom.json and build/sbom-mlflow.json,
# and what was pushed, by digest, in build/image and build/image-mlflow.
set -eu
cd "$(dirname "$0")/.."
: "${REGISTRY:?say where images go, e.g. REGISTRY=localhost:5000}"
builder=${BUILDER:-}
for one in docker podman buildah; do # a client whose engine does not run is of no use
    [ -n "$builder" ] || { "$one" info >/dev/null 2>&1 && builder=$one; } || true
done
[ -n "$builder" ] || { echo "error: neither docker nor podman nor buildah works here" >&2; exit 2; }
mkdir -p build
sources="docker/Dockerfile requirements*.lock pyproject.toml LICENSE latent_gpt.py model components pipelines"

# The commit that changed what images are made from, so that others leave them as they are.
revision() {
    # shellcheck disable=SC2086  # names are words
    last=$(git log -1 --format=%h -- $sources 2>/dev/null) || last=
    # shellcheck disable=SC2086
    [ -z "$last" ] || [ -z "$(git status --porcelain -- $sources)" ] || last=$last-dirty
    echo "${last:-unknown}"
}

# What both images are made from, in one line.
inputs() {
    # shellcheck disable=SC2086
    files=$(find $sources -type f ! -path '*/__pycache__/*' | sort)
    # shellcheck disable=SC2086
    { sha256sum $files; echo "$REGISTRY $revision ${BASE:-} ${TORCH_INDEX:-} ${BUILD_FLAGS:-}"; } | sha256sum
}

is_here() { # IMAGE
    case $(basename "$builder") in
    buildah) "$builder" inspect --type image "$1" ;;
    *) "$builder" image inspect "$1" ;;
    esac >/dev/null 2>&1
}

made() { # TARGET OPTION…
    target=$1
    shift
    # shellcheck disable=SC2086
    "$builder" build ${BUILD_FLAGS:-} --file "$dockerfile" --target "$target" "$@" \
        ${BASE:+--build-arg "BASE=$BASE"} ${CA:+--secret "id=ca,src=$CA"} \
        ${TORCH_INDEX:+--build-arg "TORCH_INDEX=$TORCH_INDEX"} \
        --build-arg "VERSION=$version" --build-arg "REVISION=$revision" .
}

pushed() { # SUFFIX
    [ -s "build/tag$1" ] || { echo "error: build/tag$1 is missing, so nothing was built; \`make build\` first" >&2; exit 2; }
    image=$(cat "build/tag$1")
    case $image in
    "$REGISTRY"/*) ;;
    *) echo "error: $image was built, for another registry than $REGISTRY; \`make build\` first" >&2; exit 2 ;;
    esac
    name=${image%:*}
    if [ "$(basename "$builder")" = docker ]; then
        # shellcheck disable=SC2086
        "$builder" push ${PUSH_FLAGS:-} "$image"
        # Every registry that it was pushed to is listed, docker.io without its name.
        digest=$("$builder" inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$image" |
            awk -v name="${name#docker.io/}@" 'index($0, name) == 1 { print substr($0, length(name) + 1); exit }')
    else
        # shellcheck disable=SC2086
        "$builder" push ${PUSH_FLAGS:-} --digestfile build/digest "$image"
        digest=$(cat build/digest)
    fi
    [ -n "$digest" ] || { echo "error: $builder does not say by which digest $image was pushed" >&2; exit 2; }
    echo "$name@$digest" >"build/image$1.new"
    mv "build/image$1.new" "build/image$1"
    cat "build/image$1"
}

case ${1:-} in
build)
    revision=$(revision)
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
    train=$REGISTRY/latent-gpt:$revision mlflow=$REGISTRY/latent-gpt-mlflow:$revision inputs=$(inputs)
    if [ "$(cat build/inputs 2>/dev/null)" = "$inputs" ] && is_here "$train" && is_here "$mlflow"; then
        echo "$train and $mlflow are built already"
        exit
    fi
    dockerfile=docker/Dockerfile
    if [ -n "${TORCH_INDEX:-}" ]; then # not every builder takes a variable for a stage's name
        dockerfile=build/Dockerfile-cpu
        sed 's/^FROM dependencies AS/FROM dependencies-cpu AS/' docker/Dockerfile >$dockerfile
    fi
    made train --tag "$train"
    made mlflow --tag "$mlflow"
    made sbom --output type=local,dest=build
    echo "$train" >build/tag
    echo "$mlflow" >build/tag-mlflow
    echo "$inputs" >build/inputs
    ;;
push)
    pushed ""
    pushed -mlflow
    ;;
*)
    echo "usage: $0 build|push" >&2
    exit 2
    ;;
esac
