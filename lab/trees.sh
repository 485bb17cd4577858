#!/bin/sh
# Make the trees that the lab's hosts are booted from: Debian 12 and 13 as a
# person would install them (systemd, an SSH server, Python), with the packages
# that the roles install waiting in apt's cache and the Python libraries as
# wheels, for a lab's hosts reach nothing outside. A minute or two, once.
#
# Run as root, after lab/setup.sh; arguments name the releases, by default both.
# Prints nothing to standard output.
set -eu
cache=/var/cache/bascule
top=$(cd "$(dirname "$0")/.." && pwd)
. "$top/lab/debian.sh"
installed="systemd systemd-sysv systemd-resolved dbus openssh-server python3 ca-certificates iproute2 procps ssl-cert python3-apt"
for_roles="postgresql postgresql-client postfix nginx-light python3-venv libmilter1.0.1 lua-socket
    dovecot-core dovecot-imapd dovecot-pop3d dovecot-lmtpd dovecot-submissiond dovecot-managesieved dovecot-sieve dovecot-pgsql dovecot-auth-lua"
# What the operators of the lab's hosts had before.
for_operators="apache2 mariadb-server postfix-mysql dovecot-mysql"
to_build="gcc libc6-dev libmilter-dev python3-dev python3-venv"
# What is inside depends on these files.
made_by=$(cat "$top/lab/trees.sh" "$top/lab/debian.sh" "$top/setup.cfg" | cksum)

for release in ${*:-bookworm trixie}; do
    tree=$cache/host-$release
    [ "$(cat "$tree/made-by" 2>/dev/null)" = "$made_by" ] && continue
    echo "making the tree of the lab's $release hosts" >&2
    rm -rf --one-file-system "$tree" "$tree.build"
    make_tree "$release" "$tree.new" "$(echo "$installed" | tr ' ' ,)"
    # shellcheck disable=SC2086 # one word a package
    install_inside "$tree.new" --download-only $for_roles $for_operators $to_build
    # Compilers are for the wheels, and not left on the hosts.
    cp -a "$tree.new" "$tree.build"
    cp -L /etc/ssl/certs/ca-certificates.crt "$tree.build/etc/ssl/certs/"
    # shellcheck disable=SC2086
    install_inside "$tree.build" $to_build
    mkdir "$tree.build/source" "$tree.build/wheels"
    tar -C "$top" --exclude=./.git --exclude=./build -cf - . | tar -C "$tree.build/source" -xf -
    # pymilter as source, too, and what pip builds it with: for hosts that install from an index.
    inside "$tree.build" sh -euc 'python3 -m venv /venv && /venv/bin/pip install --quiet --upgrade pip && cd /wheels && \
        /venv/bin/pip wheel --quiet --disable-pip-version-check /source && rm bascule-*.whl && \
        /venv/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: pymilter && \
        /venv/bin/pip download --quiet --disable-pip-version-check setuptools wheel'
    tar -C "$tree.build/wheels" -cf "$tree.new/wheels.tar" .
    rm -rf --one-file-system "$tree.build"
    rm "$tree.new/usr/sbin/policy-rc.d" "$tree.new/etc/hosts" "$tree.new/etc/resolv.conf"
    rm -f "$tree.new/etc/pip.conf" "$tree.new"/etc/apt/apt.conf.d/99*
    echo "$made_by" > "$tree.new/made-by"
    mv "$tree.new" "$tree"
done
