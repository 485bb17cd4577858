#!/bin/sh
# Install what the lab needs: Debian packages, and bascule with its Python
# libraries in a virtual environment of this checkout's own. Prints the path of
# the environment; everything else goes to standard error.
#
# Run as root. Servers that the packages bring are not started, and servers
# that run already are left alone.
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
. "$top/lab/debian.sh"
# Not inside the checkout: the lab's servers run as users of their own, who
# could not enter a checkout in /root.
venv=${BASCULE_VENV:-/var/cache/bascule/venv-$(printf %s "$top" | cksum | cut -d ' ' -f 1)}
cyrus=/var/cache/bascule/cyrus
trixie=/var/cache/bascule/trixie
packages="postfix dovecot-core dovecot-imapd dovecot-pop3d dovecot-lmtpd dovecot-submissiond dovecot-pgsql
    isync dovecot-managesieved dovecot-sieve cyrus-common sasl2-bin libsasl2-modules libsasl2-modules-db
    dovecot-auth-lua lua-socket debootstrap iproute2 postgresql python3 python3-venv python3-dev gcc libc6-dev libmilter-dev
    chromium chromium-driver fonts-dejavu-core dnsmasq-base prometheus nginx-light man-db
    pgbouncer systemd-container openssh-client git ca-certificates"

if [ "$(id -u)" != 0 ]; then
    echo "lab/setup.sh: run this as root: Postfix, Dovecot and PostgreSQL are run as users of their own" >&2
    exit 1
fi

missing=
for package in $packages; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
done
if [ -n "$missing" ]; then
    echo "installing$missing" >&2
    # While this file says 101, Debian starts no service that a package brings.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        trap 'exit 1' HUP INT TERM
        printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
    fi
    export DEBIAN_FRONTEND=noninteractive
    case $missing in
    *postfix*) echo "postfix postfix/main_mailer_type select No configuration" | debconf-set-selections >&2 ;;
    esac
    apt-get update -qq >&2
    # shellcheck disable=SC2086 # one word a package
    apt-get install -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends $missing >&2
fi

# Debian's cyrus-imapd conflicts with dovecot-imapd: it is unpacked, not installed.
if [ ! -x "$cyrus/usr/lib/cyrus/bin/imapd" ]; then
    echo "unpacking cyrus-imapd and cyrus-pop3d" >&2
    rm -rf "$cyrus" && mkdir -p "$cyrus"
    (cd "$cyrus" && apt-get download -qq cyrus-imapd cyrus-pop3d 2>/dev/null >&2 && for package in ./*.deb; do
        dpkg-deb -x "$package" "$cyrus"
    done) >&2
fi

# Debian 13, for its Dovecot 2.4. Its programs are run in this tree; it is not booted.
if [ ! -e "$trixie/usr/sbin/dovecot" ]; then
    echo "unpacking Debian 13 with Dovecot 2.4" >&2
    make_tree trixie "$trixie.new" ca-certificates
    # Its own are links that lead out of the tree when they are looked at from here.
    rm -rf "$trixie.new/etc/ssl/certs"
    cp -rL /etc/ssl/certs "$trixie.new/etc/ssl/"
    install_inside "$trixie.new" dovecot-core dovecot-imapd dovecot-pop3d dovecot-lmtpd dovecot-submissiond dovecot-pgsql \
        dovecot-managesieved dovecot-sieve dovecot-auth-lua lua-socket
    rm -rf --one-file-system "$trixie"
    mv "$trixie.new" "$trixie"
fi

[ -x "$venv/bin/python" ] || /usr/bin/python3 -m venv "$venv" >&2
rm -rf "$top/build"  # or modules that are gone from the source would be installed
echo "installing bascule into $venv" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$top[test]" >&2
# The version number does not change with every edit; the code does.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$top" >&2
echo "$venv"
