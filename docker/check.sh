#!/usr/bin/env bash
# Build the service image, look into it, start it as locked up as docker-compose.yml does, ask it for a prediction, and
# stop it with SIGTERM. Prints the image's size by layer. From anywhere: docker/check.sh
#
#   BUILDER       docker (default), or buildah, which needs no engine: set BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
#                 where there are no user namespaces; it must run as root, to mount and to change root
#   RUNTIME       cpu (default) or gpu; a gpu image is built and looked into, and started on the CPU
#   PYTHON_IMAGE  another base image, such as a stand-in with Python 3.11 where no registry can be reached
#   MODELS        folder of model folders (default: models/), MODEL_NAME the one in it (default: perceiver-cifar100)
#   BUILD_FLAGS   more flags for the build, such as --network=host
set -euo pipefail
cd "$(dirname "$0")/.."

builder=${BUILDER:-docker}
runtime=${RUNTIME:-cpu}
models=$(realpath "${MODELS:-models}")
model=/models/${MODEL_NAME:-perceiver-cifar100}
image=localhost/perceiver-service:check-$runtime
port=$((20000 + RANDOM % 10000))
scratch=$(mktemp -d)
read -ra flags <<<"${BUILD_FLAGS:-}"
flags+=(--build-arg "RUNTIME=$runtime" ${PYTHON_IMAGE:+--build-arg "PYTHON_IMAGE=$PYTHON_IMAGE"})

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'check.sh: %s\n' "$*" >&2; exit 1; }

# The two builders: build, inside (run in a container of the image), start, healthy, stop, layers, clean.
case $builder in
docker)
    build() { docker build "${flags[@]}" -f docker/service.Dockerfile -t "$image" .; }
    inside() { docker run --rm --entrypoint "$1" "$image" "${@:2}"; }
    start() {
        container=$(docker run -d --init --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
            -v "$models:/models:ro" -p "127.0.0.1:$port:8000" \
            -e PERCEIVER_MODEL_DIR="$model" -e PERCEIVER_PROVIDER=cpu "$image")
    }
    healthy() { [ "$(docker inspect -f '{{.State.Health.Status}}' "$container")" = healthy ]; }
    alive() { [ "$(docker inspect -f '{{.State.Running}}' "$container")" = true ]; }
    stop() { docker stop -t 40 "$container" >/dev/null; status=$(docker inspect -f '{{.State.ExitCode}}' "$container"); }
    logs() { docker logs "$container" 2>&1; }
    layers() { docker history --format '{{.Size}}\t{{.CreatedBy}}' "$image" | grep -v '^0B'; }
    clean() { [ -z "${container:-}" ] || docker rm -f "$container" >/dev/null; }
    ;;
buildah)
    # The health check is a field of Docker's image format.
    build() { buildah bud --layers --format docker "${flags[@]}" -f docker/service.Dockerfile -t "$image" .; }
    enter() {
        container=$(buildah from "$image")
        root=$(buildah mount "$container")
        buildah inspect --type image --format '{{range .Docker.Config.Env}}{{println .}}{{end}}' "$image" |
            sed '/^$/d' >"$scratch/env"
        mapfile -t environment <"$scratch/env"
        environment+=(PERCEIVER_MODEL_DIR="$model" PERCEIVER_PORT="$port" PERCEIVER_PROVIDER=cpu)
    }
    inside() {
        [ -n "${root:-}" ] || enter
        # shellcheck disable=SC2016 # expanded there, not here
        unshare --mount bash -euc '
            mount -t proc proc "$0/proc"
            exec chroot --userspec=10001:10001 "$0" env -i -C /app "$@"
        ' "$root" "${environment[@]}" "$@"
    }
    # What Docker does for --read-only, --tmpfs, -v, --cap-drop and no-new-privileges.
    start() {
        # shellcheck disable=SC2016 # expanded there, not here
        unshare --mount bash -euc '
            root=$1 models=$2; shift 2
            mkdir -p "$root/models"
            mount --bind "$root" "$root"
            mount --rbind /dev "$root/dev"
            mount -t proc proc "$root/proc"
            mount -t tmpfs tmpfs "$root/tmp"
            mount --bind "$models" "$root/models"
            mount -o remount,ro,bind "$root/models"
            mount -o remount,ro,bind "$root"
            cd "$root/app"
            exec chroot "$root" setpriv --reuid=10001 --regid=10001 --clear-groups --bounding-set=-all --inh-caps=-all \
                --no-new-privs env -i -C /app "$@" python -m service
        ' bash "$root" "$models" "${environment[@]}" >"$scratch/log" 2>&1 &
        process=$!
    }
    healthy() { inside python -IS /app/healthcheck.py 2>/dev/null; }
    alive() { kill -0 "$process" 2>/dev/null; }
    stop() { kill -TERM "$process"; status=0; wait "$process" || status=$?; }
    logs() { cat "$scratch/log"; }
    layers() {
        buildah push -q "$image" "dir:$scratch/pushed" >/dev/null
        python3 -c '
import json, sys
for layer in reversed(json.load(sys.stdin)["layers"]):
    print(layer["size"] // 10**6, "MB, compressed")' <"$scratch/pushed/manifest.json"
    }
    clean() {
        [ -z "${process:-}" ] || kill "$process" 2>/dev/null || true
        [ -z "${container:-}" ] || buildah rm "$container" >/dev/null
    }
    ;;
*) fail "BUILDER is docker or buildah, not $builder" ;;
esac
trap 'clean; rm -rf "$scratch"' EXIT

[ -d "$models/${model#/models/}" ] || fail "there is no model folder $models/${model#/models/}; set MODELS and MODEL_NAME"

say "building $image with $builder"
build

say "looking into it"
inside python -c 'import onnxruntime, service.api.app; print("onnxruntime", onnxruntime.__version__)'
inside python -c 'import importlib.util as i, sys; sys.exit(any(map(i.find_spec, ("torch", "training", "export", "pip"))))' ||
    fail "it holds torch, pip, or what only training needs"
inside sh -c '! command -v gcc cc c++ curl' || fail "it holds a compiler or curl"
# shellcheck disable=SC2016 # likewise
inside sh -c '[ "$(id -u)" = 10001 ] && ! touch /app/x 2>/dev/null' || fail "it runs as root, or can write to itself"
if [ "$runtime" = gpu ]; then
    inside python -c '
import onnxruntime
assert "CUDAExecutionProvider" in onnxruntime.get_available_providers()
onnxruntime.preload_dlls()
loaded = {line.split("/")[-1].strip() for line in open("/proc/self/maps") if "/opt/cuda/" in line}
assert any(name.startswith("libcudnn") for name in loaded) and any(name.startswith("libcublas") for name in loaded), loaded
print("CUDA and cuDNN load from their wheels")'
fi

say "starting it: read-only, no capabilities, user 10001"
start
for _ in $(seq 240); do
    healthy && break
    alive || { logs; fail "it ended"; }
    sleep 0.25
done
healthy || { logs; fail "it did not become healthy in a minute"; }

say "asking it"
base64 -d >"$scratch/image.png" <<<"iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGNkaGhgYGBgYmBgYGBgAAALqgEE5z0TngAAAABJRU5ErkJggg=="
curl -fsS -H "Content-Type: image/png" --data-binary "@$scratch/image.png" "http://127.0.0.1:$port/predict"

say "stopping it"
stop
logs | tail -n 3
[ "$status" = 0 ] || fail "it ended with status $status"

say "its size by layer, the last first"
layers
