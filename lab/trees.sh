#!/bin/sh
# Make the trees that the lab's hosts are booted from: Debian 12 and 13 as a
# person would install them (systemd, an SSH server, Python), with the packages
# that the roles install waiting in apt's cache and the Python libraries as
# wheels, for a lab's hosts reach nothing outside. Some minutes, once.
#
# Run as root, after lab/setup.sh. Prints nothing to standard output.
set -eu
cache=/var/cache/bascule
top=$(cd "$(dirname "$0")/.." && pwd)
installed="systemd systemd-sysv systemd-resolved dbus libpam-systemd openssh-server python3 ca-certificates iproute2 procps ssl-cert python3-apt"
for_roles="postgresql postfix nginx-light python3-venv libmilter1.0.1 lua-socket dovecot-core dovecot-imapd
    dovecot-pop3d dovecot-lmtpd dovecot-submissiond dovecot-managesieved dovecot-sieve dovecot-pgsql dovecot-auth-lua"
for_wheels="gcc libc6-dev libmilter-dev python3-dev python3-venv"
mirror=$(sed -n 's/^URIs: *//p; s/^deb *\(\[[^]]*\] *\)\?\(http[^ ]*\).*/\2/p' \
    /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | grep -v security | head -n 1)

# $1: a tree. The rest: a command that is run there, with this machine's network.
inside() {
    unshare --mount --propagation private sh -euc '
        tree=$1; shift
        mount -t proc proc "$tree/proc"
        mount --rbind /dev "$tree/dev"
        mount -t tmpfs tmpfs "$tree/tmp"
        export DEBIAN_FRONTEND=noninteractive
        exec chroot "$tree" "$@"
    ' sh "$@" >&2
}

for release in bookworm trixie; do
    tree=$cache/host-$release
    [ -e "$tree/wheels.tar" ] && continue
    echo "making the tree of the lab's $release hosts" >&2
    rm -rf --one-file-system "$tree" "$tree.new" "$tree.build"
    debootstrap --variant=minbase --include="$(echo "$installed" | tr ' ' ,)" "$release" "$tree.new" \
        "${mirror:-http://deb.debian.org/debian}" >&2
    printf '#!/bin/sh\nexit 101\n' > "$tree.new/usr/sbin/policy-rc.d"
    chmod 755 "$tree.new/usr/sbin/policy-rc.d"
    rm -f "$tree.new/etc/resolv.conf"
    for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/apt/apt.conf.d/99*; do
        [ -e "$file" ] && cp -L "$file" "$tree.new$file"
    done
    # shellcheck disable=SC2086 # one word a package
    inside "$tree.new" apt-get install -y -qq --no-install-recommends --download-only $for_roles
    # Compilers are for the wheels, and not left on the hosts.
    cp -a "$tree.new" "$tree.build"
    cp -L /etc/ssl/certs/ca-certificates.crt "$tree.build/etc/ssl/certs/"
    # shellcheck disable=SC2086
    inside "$tree.build" apt-get install -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends $for_wheels
    mkdir "$tree.build/source" "$tree.build/wheels"
    tar -C "$top" --exclude=./.git --exclude=./build -cf - . | tar -C "$tree.build/source" -xf -
    inside "$tree.build" sh -euc 'python3 -m venv /venv && /venv/bin/pip install --quiet --upgrade pip wheel && \
        /venv/bin/pip wheel --quiet --disable-pip-version-check \
        --wheel-dir /wheels /source && rm /wheels/bascule-*.whl'
    tar -C "$tree.build/wheels" -cf "$tree.new/wheels.tar" .
    rm -rf --one-file-system "$tree.build"
    rm "$tree.new/usr/sbin/policy-rc.d" "$tree.new/etc/hosts" "$tree.new/etc/resolv.conf"
    rm -f "$tree.new/etc/pip.conf" "$tree.new"/etc/apt/apt.conf.d/99*
    mv "$tree.new" "$tree"
done
