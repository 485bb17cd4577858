# For lab/setup.sh and lab/trees.sh, which read it: Debian in a directory, made and entered by root.

# Whether this machine lets us mount in a namespace of our own; a plain container does not, nor does a root that is no
# mount point.
may_mount() {
    unshare --mount --propagation private mount -t tmpfs tmpfs /tmp 2> /dev/null
}

# Where apt is told to find Debian.
mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | head -n 1 | sed 's#/$##'
}

# $1: a release. $2: the directory. $3: packages, by commas. It reaches what this machine reaches, and starts no service.
make_tree() {
    from=$(mirror)
    case $from in
    http*:* | file:*) ;;
    *)
        echo "lab/debian.sh: apt finds Debian at '$from', which debootstrap cannot read" >&2
        return 1
        ;;
    esac
    rm -rf --one-file-system "$2"
    # What it mounts is gone with it, should it be ended from outside.
    unshare --mount --propagation private \
        debootstrap --variant=minbase --include="$3" "$1" "$2" "$from" >&2
    printf '#!/bin/sh\nexit 101\n' > "$2/usr/sbin/policy-rc.d"
    chmod 755 "$2/usr/sbin/policy-rc.d"
    rm -f "$2/etc/resolv.conf"
    for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/apt/apt.conf.d/99*; do
        if [ -e "$file" ]; then cp -L "$file" "$2$file"; fi
    done
}

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

# $1: a tree. The rest: packages, or options of apt-get.
install_inside() {
    within=$1
    shift
    inside "$within" apt-get install -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends "$@"
}
