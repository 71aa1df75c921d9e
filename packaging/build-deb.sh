#!/usr/bin/env bash
# Builds the Debian package of this checkout and prints its path.
#
#   ./packaging/build-deb.sh [OUTPUT_FOLDER]     default: dist/, which git ignores
#
# What it builds with (debian/control: Build-Depends) is installed with apt where it is missing, as root
# or with sudo. Tracked files are built as they are now; the build itself lies in a temporary folder.
set -euo pipefail

checkout=$(cd "$(dirname "$0")/.." && pwd)
output=${1:-$checkout/dist}
mkdir -p "$output"
output=$(cd "$output" && pwd)

# Debian's Python with Debian's modules, whatever environment is active here.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 TZ=UTC
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV DEB_BUILD_OPTIONS DEB_BUILD_PROFILES
umask 022

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Show what a command printed only where it fails.
quietly() {
    "$@" >"$work/log" 2>&1 && return
    cat "$work/log" >&2
    printf 'failed: %s\n' "$*" >&2
    return 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        printf 'What the build needs is missing and cannot be installed without root.\nhint: sudo' >&2
        printf ' %q' "$@" >&2
        printf '\n' >&2
        return 1
    fi
}

# A checkout of another user's is read here, nothing in it is run by git.
git() { command git -c safe.directory='*' -C "$checkout" "$@"; }

copy_checkout() {
    local file files=()
    if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
        while IFS= read -r -d '' file; do
            if [ -e "$checkout/$file" ]; then files+=("$file"); fi
        done < <(git ls-files -z)
        date=$(git log -1 --format=%ct)
    else
        # The archive of a release.
        files=(--exclude=./dist .)
        date=$(stat -c %Y "$checkout/CHANGELOG.md")
    fi
    mkdir "$work/lfsvc"
    tar -C "$checkout" -c "${files[@]}" | tar -C "$work/lfsvc" -x --no-same-owner
    mv "$work/lfsvc/packaging/debian" "$work/lfsvc/debian"
}

# One entry: the version is lfsvc/__init__.py's, the time the last change's, so that a build can be repeated.
write_changelog() {
    local version maintainer
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' lfsvc/__init__.py)
    # 0.2.0rc1 comes before 0.2.0: in Debian's order that is 0.2.0~rc1.
    version=$(sed -E 's/\.?((a|b|rc|dev)[0-9]+)/~\1/g' <<<"$version")
    maintainer=$(sed -n 's/^Maintainer: //p' debian/control)
    printf 'lfsvc (%s-1) unstable; urgency=medium\n\n  * See changelog.gz, which is CHANGELOG.md.\n\n -- %s  %s\n' \
        "$version" "$maintainer" "$(date -R -d "@$date")" >debian/changelog
}

install_build_dependencies() {
    local needed
    needed=$(sed -n '/^Build-Depends:/,/^$/{s/^Build-Depends://;p}' debian/control | tr -d '\n')
    # -I: build-essential has a compiler, of which nothing here makes use.
    if dpkg-checkbuilddeps -I 2>/dev/null; then return; fi
    quietly as_root apt-get -o DPkg::Lock::Timeout=600 update
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 \
        satisfy -y --no-install-recommends "dpkg-dev, $needed"
}

copy_checkout
cd "$work/lfsvc"
write_changelog
install_build_dependencies
quietly dpkg-buildpackage -us -uc -b -d
cp "$work"/lfsvc_*_all.deb "$output"
basename "$work"/lfsvc_*_all.deb | sed "s|^|$output/|"
