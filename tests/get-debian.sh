#!/usr/bin/env bash
# get-debian.sh ROOT SUITE PACKAGE...
# Makes ROOT a folder in which packages of that Debian suite (bookworm, trixie, forky) run by chroot, and prints its path.
# Nothing is installed on this machine, no maintainer script runs and no service starts: the packages are downloaded with
# apt state of their own (apt checks signatures as always) and only unpacked. Needs root and Debian's archive keyring.
set -euo pipefail
root=${1:?root}
suite=${2:?suite}
shift 2
base=$(dirname "$root")
name=$(basename "$root")
mkdir -p "$base"
exec 9>"$base/.lock-$name"
flock 9    # two test runs at once: the second waits, and finds it made
[ -f "$root/.ready" ] && { echo "$root"; exit 0; }

# The mirror that this machine already uses; Debian's own otherwise.
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null \
  | awk '!/^ *#/ { for (i = 1; i <= NF; i++) if (!found && $i ~ /^https?:.*\/debian\/?$/) { print $i; found = 1 } }' || true)
mirror=${mirror:-http://deb.debian.org/debian}
key=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e "$key" ] || key=/usr/share/keyrings/debian-archive-keyring.pgp

apt=$base/.apt-$name
part=$root.part
trap 'rm -rf "$apt" "$part"' EXIT
rm -rf "$apt" "$part"
mkdir -p "$apt"/{lists/partial,cache/archives/partial,etc/preferences.d,etc/sources.list.d,etc/apt.conf.d,etc/trusted.gpg.d} "$part"
: >"$apt/status"
options="signed-by=$key"
# testing's Release is valid for seven days, and a mirror may be behind; the signature is checked all the same.
[ "$suite" = forky ] && options="$options check-valid-until=no"
echo "deb [$options] $mirror $suite main" >"$apt/etc/sources.list"
cat >"$apt/apt.conf" <<CONF
Dir::State "$apt"; Dir::State::status "$apt/status"; Dir::State::lists "$apt/lists";
Dir::Cache "$apt/cache"; Dir::Etc "$apt/etc"; APT::Architecture "$(dpkg --print-architecture)";
APT::Sandbox::User "root"; Acquire::Languages "none"; APT::Update::Post-Invoke-Success "";
Acquire::Retries "3"; APT::Install-Recommends "false";
CONF
export APT_CONFIG=$apt/apt.conf
quiet() { "$@" >>"$apt/log" 2>&1 || { tail -5 "$apt/log" >&2; exit 1; }; }
quiet apt-get -q update
# the packages with all they depend on, and the essentials that their shell scripts call
quiet apt-get -qy --download-only install "$@" base-files dash bash coreutils sed grep mawk \
  findutils hostname procps util-linux ncurses-base

cd "$part"
mkdir -p usr/{bin,sbin,lib,lib64} proc dev sys tmp run etc root mnt var/{log,lib,tmp}
for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$folder"; done    # merged /usr, before unpacking
for package in "$apt"/cache/archives/*.deb; do dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink; done
[ -e usr/bin/awk ] || ln -s mawk usr/bin/awk                                # update-alternatives would have
printf 'root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/usr/sbin/nologin\n' >etc/passwd
printf 'root:x:0:\nnogroup:x:65534:\n' >etc/group
printf '127.0.0.1 localhost\n' >etc/hosts
touch etc/resolv.conf
chmod 1777 tmp var/tmp
cd "$base"
touch "$part/.ready"
rm -rf "$root"
mv "$part" "$root"
echo "$root"
