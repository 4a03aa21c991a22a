#!/bin/sh
# Makes sure that Debian's packages named as arguments are there: as root installs the missing ones, else says how to.
set -eu
missing=
for package in "$@"; do
    case $package in
        # A program that is there already, from wherever it came, will do.
        gcc | npm | curl | wrk) command -v "$package" >/dev/null && continue ;;
        nginx | caddy) PATH=$PATH:/usr/sbin command -v "$package" >/dev/null && continue ;;
        python3-venv) python3 -c 'import ensurepip, venv' 2>/dev/null && continue ;;
        python3-dev) test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" && continue ;;
        libgmp-dev) test -n "$(find /usr/include /usr/local/include -name gmp.h 2>/dev/null | head -n 1)" && continue ;;
        libc6-dev) test -e /usr/include/stdlib.h && continue ;;
    esac
    missing="$missing $package"
done
[ -z "$missing" ] && exit 0
command="apt-get update && apt-get install -y --no-install-recommends$missing"
if ! command -v apt-get >/dev/null; then
    echo "error: this machine lacks$missing (Debian's names); install them, then run make again" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "error: this machine lacks$missing; type this, then run make again:" >&2
    echo "  sudo sh -c '$command'" >&2
    exit 1
fi
echo "installing Debian's packages:$missing"
log=$(mktemp)
trap 'rm -f "$log" $policy' EXIT
# A server among them is wanted as a program for the tests, and must not become a service of this machine.
policy=
if ! [ -e /usr/sbin/policy-rc.d ]; then
    policy=/usr/sbin/policy-rc.d
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
fi
if ! { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "error: installing$missing failed; the lines above say why" >&2
    exit 1
fi
