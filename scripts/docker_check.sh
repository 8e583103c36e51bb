#!/usr/bin/env bash
# Are the files of docker/ right? Builds and runs them without a container service: with buildah in a chroot, on a
# Debian that debootstrap unpacks, near to the published debian:bookworm-slim. No GPU is used. As root, on Debian:
#
#   apt-get install buildah debootstrap
#   scripts/docker_check.sh FOLDER          twenty minutes, up to 26 GB in FOLDER, of which check.log stays
set -euo pipefail

fail() {
    echo "docker_check: $1" >&2
    exit 1
}

(($# == 1)) || fail "usage: scripts/docker_check.sh FOLDER"
((UID == 0)) || fail "needs root, for debootstrap and chroot"
for tool in buildah debootstrap; do
    type -P "$tool" >/dev/null || fail "there is no $tool: apt-get install buildah debootstrap"
done
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$out/work
[[ ! -e $work ]] || fail "$work is there already: name another folder, or remove it"
mkdir "$work"
exec > >(tee "$out/check.log") 2>&1

store() { buildah --root "$work/storage" --runroot "$work/run" "$@"; }
clean() {
    store rm --all >/dev/null 2>&1 || true
    umount "$work/storage/overlay" 2>/dev/null || true
    rm -rf --one-file-system "$work"
}
trap clean EXIT

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

# build DOCKERFILE IMAGE
build() { store build --isolation chroot --layers --pull-never -f "docker/$1" -t "$2" .; }

# inside IMAGE USER COMMAND...: in a fresh container, as `docker run --rm --user USER IMAGE COMMAND...`
inside() {
    local container status=0
    container=$(store from --pull-never "$1")
    store run --isolation chroot --user "$2" "$container" -- "${@:3}" || status=$?
    store rm "$container" >/dev/null
    return "$status"
}

train=(env OMP_NUM_THREADS=1 python -m fcmae.pretrain +model=custom 'model.depths=[1,1,1,1]' 'model.dims=[8,16,32,64]'
    model.decoder_dim=16 experiment=smoke trainer=cpu trainer.max_steps=2 pictures=0)

say "a Debian to build on"
debootstrap --variant=minbase bookworm "$work/debian"
if [[ -f ${PIP_CERT:-} ]]; then # pip needs it here, so it needs it there
    cp "$PIP_CERT" "$work/debian/etc/pip.pem"
    printf '[global]\ncert = /etc/pip.pem\n' >"$work/debian/etc/pip.conf"
fi
container=$(store from scratch)
tar -C "$work/debian" -cf "$work/debian.tar" .
store add --quiet "$container" "$work/debian.tar" /
store commit --quiet --rm "$container" localhost/debian:bookworm-slim
rm -rf "$work/debian" "$work/debian.tar"

say "docker/Dockerfile"
build Dockerfile fcmae:0.1.0
mapfile -t default < <(store inspect --type image fcmae:0.1.0 |
    python3 -c 'import json, sys; print(*json.load(sys.stdin)["OCIv1"]["config"]["Cmd"], sep="\n")')
say "its default command, then runs as its own user and as one that it does not know"
inside fcmae:0.1.0 1000:1000 "${default[@]}"
inside fcmae:0.1.0 1000:1000 "${train[@]}"
inside fcmae:0.1.0 54321:54321 "${train[@]}" compile=true

say "docker/Dockerfile.minkowski"
build Dockerfile.minkowski fcmae:0.1.0-minkowski
inside fcmae:0.1.0-minkowski 54321:54321 "${train[@]}" model.engine=minkowski

say "docker/fcmae.def: %post, %environment and %test, with the wheel of the image"
section() { awk -v name="%$1" '/^%/ { inside = ($1 == name); next } inside' docker/fcmae.def; }
for name in post environment test; do
    section "$name" >"$work/$name.sh"
    [[ -s $work/$name.sh ]] || fail "docker/fcmae.def has no %$name"
done
container=$(store from --pull-never localhost/debian:bookworm-slim)
store copy --quiet --from fcmae:0.1.0 "$container" /opt/fcmae/wheel /opt/fcmae/wheel
store copy --quiet "$container" "$work/post.sh" "$work/environment.sh" "$work/test.sh" /
store run --isolation chroot "$container" -- sh -e /post.sh
store run --isolation chroot "$container" -- sh -e /test.sh
# As Apptainer does it: the caller's user and a home folder of his own.
# shellcheck disable=SC2016  # expanded inside
store run --isolation chroot --user 54321:54321 "$container" -- \
    sh -ec '. /environment.sh; cd "$(mktemp -d)"; HOME=$PWD exec "$@"' sh "${train[@]}"

say "passed"
store images
