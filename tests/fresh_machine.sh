#!/bin/sh
# Tries the first steps of the README where nothing is installed: an empty Debian with only the packages that it names.
# In: the checked-in files (REVISION=… or HEAD) and this machine's apt, pip and certificate settings. Out: what `make demo` and
# `make test` say in there, and how long each took. Needs root, debootstrap and git; leaves nothing behind.
set -eu
packages=make,python3,python3-venv,gcc,libc6-dev,ca-certificates

[ "$(id -u)" = 0 ] || { echo "fresh_machine.sh needs root" >&2; exit 1; }
for program in debootstrap git unshare; do
  command -v $program >/dev/null || { echo "$program not found: apt-get install debootstrap git util-linux" >&2; exit 1; }
done
# Mounts and processes of its own: all end with this script, however it ends.
[ "${1-}" = inside ] || exec unshare --mount --pid --fork --kill-child sh "$0" inside

cd "$(dirname "$0")/.."
root=$(mktemp -d)
trap 'umount -R "$root/proc" "$root/sys" "$root/dev" 2>/dev/null; rm -rf --one-file-system "$root"' EXIT
trap 'exit 130' INT TERM

timed() { # NAME COMMAND…
  name=$1 start=$(date +%s)
  shift
  set +e
  (set -e; "$@")
  code=$?
  set -e
  echo "== $name: exit code $code, $(($(date +%s) - start)) s"
  [ $code = 0 ] || result=1
}

make_root() {
  source=$(apt-get indextargets --format '$(SITE) $(CODENAME)' 'Created-By: Packages' | head -n 1)
  debootstrap --variant=minbase --include=$packages "${source#* }" "$root" "${source% *}" >"$root.log" 2>&1 || {
    tail -n 5 "$root.log" >&2
    return 1
  }
  rm "$root.log"
  # This machine's way to the network.
  rm -rf "$root/etc/apt"
  for path in /etc/apt /etc/pip.conf "$HOME/.pip" "$HOME/.config/pip" /usr/local/share/ca-certificates; do
    [ ! -e "$path" ] || { mkdir -p "$root${path%/*}"; cp -a "$path" "$root${path%/*}/"; }
  done
  cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
  chroot "$root" update-ca-certificates >/dev/null 2>&1
  cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  mkdir -p "$root/gpuglass" "$root$HOME"
  git archive "${REVISION:-HEAD}" | tar -x -C "$root/gpuglass"
  mount -t proc proc "$root/proc"
  mount --rbind /sys "$root/sys"
  mount --rbind /dev "$root/dev"
}

inside() { # COMMAND…: with this machine's environment, for what pip needs of it, but a plain PATH and no cache
  chroot "$root" env -u GPUGLASS_CACHE -u XDG_CACHE_HOME PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    sh -c 'cd /gpuglass && exec "$@"' sh "$@"
}

result=0
timed "empty Debian" make_root
[ $result = 0 ] || exit 1
timed "make demo" inside make demo SECONDS=30
timed "make test" inside make test
exit $result
