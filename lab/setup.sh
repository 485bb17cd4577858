#!/bin/sh
# Install what the lab needs: Debian packages, and bascule with its Python
# libraries in a virtual environment of this checkout's own. Prints the path of
# the environment; everything else goes to standard error.
#
#     lab/setup.sh [story|tests|hosts]
#
# story: what lab/story.sh needs; a container without further rights will do.
# tests, if nothing is said: what every test but that of hosts needs, too.
# hosts: all that, and what boots hosts.
#
# Run as root. Servers that the packages bring are not started, and servers
# that run already are left alone.
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
. "$top/lab/debian.sh"
group=${1:-tests}
# Not inside the checkout: the lab's servers run as users of their own, who
# could not enter a checkout in /root.
venv=${BASCULE_VENV:-/var/cache/bascule/venv-$(printf %s "$top" | cksum | cut -d ' ' -f 1)}
cyrus=/var/cache/bascule/cyrus
courier=/var/cache/bascule/courier
trixie=/var/cache/bascule/trixie

dovecot="dovecot-core dovecot-imapd dovecot-pop3d dovecot-lmtpd dovecot-submissiond dovecot-pgsql
    dovecot-managesieved dovecot-sieve dovecot-auth-lua lua-socket"
story="postfix $dovecot postgresql dnsmasq-base python3 python3-venv python3-dev gcc libc6-dev libmilter-dev ca-certificates"
tests="isync cyrus-common sasl2-bin libsasl2-modules libsasl2-modules-db debootstrap iproute2 openssh-client git
    chromium chromium-driver fonts-dejavu-core prometheus nginx-light man-db pgbouncer"
hosts="systemd-container"
case $group in
story) packages=$story extra=lab ;;
tests) packages="$story $tests" extra=test ;;
hosts) packages="$story $tests $hosts" extra=test ;;
*)
    echo "lab/setup.sh: story, tests or hosts, not $group" >&2
    exit 2
    ;;
esac

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
if [ "$group" != story ] && [ ! -x "$cyrus/usr/lib/cyrus/bin/imapd" ]; then
    echo "unpacking cyrus-imapd and cyrus-pop3d" >&2
    rm -rf "$cyrus" && mkdir -p "$cyrus"
    (cd "$cyrus" && apt-get download -qq cyrus-imapd cyrus-pop3d 2>/dev/null >&2 && for package in ./*.deb; do
        dpkg-deb -x "$package" "$cyrus"
    done) >&2
fi

# courier-imap conflicts with every other IMAP server: it is unpacked, with the libraries that nothing else here brings.
if [ "$group" != story ] && [ ! -x "$courier/usr/bin/imapd" ]; then
    echo "unpacking courier-imap and courier-pop" >&2
    rm -rf "$courier" "$courier.new" && mkdir -p "$courier.new"
    (cd "$courier.new" && apt-get download -qq courier-imap courier-pop courier-base courier-authdaemon courier-authlib \
        courier-authlib-userdb libcourier-unicode4 gamin libgamin0 libltdl7 libidn12 2>/dev/null >&2 && for package in ./*.deb; do
        dpkg-deb -x "$package" . && rm "$package"
    done) >&2
    mv "$courier.new" "$courier"
fi

# Debian 13, for its Dovecot 2.4. Its programs are run in this tree; it is not booted.
if [ "$group" != story ] && [ ! -e "$trixie/usr/sbin/dovecot" ]; then
    if may_mount; then
        echo "unpacking Debian 13 with Dovecot 2.4" >&2
        make_tree trixie "$trixie.new" ca-certificates
        # Its own are links that lead out of the tree when they are looked at from here.
        rm -rf "$trixie.new/etc/ssl/certs"
        cp -rL /etc/ssl/certs "$trixie.new/etc/ssl/"
        # shellcheck disable=SC2086 # one word a package
        install_inside "$trixie.new" $dovecot
        rm -rf --one-file-system "$trixie"
        mv "$trixie.new" "$trixie"
    else
        echo "no Debian 13 beside this system: nothing may be mounted here. Tests that need it are skipped, and named." >&2
    fi
fi

[ -x "$venv/bin/python" ] || /usr/bin/python3 -m venv "$venv" >&2
rm -rf "$top/build"  # or modules that are gone from the source would be installed
echo "installing bascule into $venv" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$top[$extra]" >&2
# The version number does not change with every edit; the code does.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$top" >&2
echo "$venv"
