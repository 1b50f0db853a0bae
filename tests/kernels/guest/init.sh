#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=dash
# First process of the guest, in the initrd: makes the machine's files the root, below a tmpfs.
bb=/bin/busybox

setting() { # NAME: the value of weir.NAME on the kernel's command line
	$bb sed -n "s|.*\\bweir\\.$1=\\([^ ]*\\).*|\\1|p" /proc/cmdline
}

give_up() {
	echo "weir: $1" >/dev/console
	$bb reboot -f
}

$bb mount -t proc proc /proc
$bb mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
	$bb insmod "$module" || give_up "insmod $module failed"
done
$bb mount -t virtiofs machine /machine || give_up "no virtiofs"
$bb mount -t tmpfs -o size=75% changes /changes
$bb mkdir /changes/upper /changes/work
$bb mount -t overlay \
	-o lowerdir=/machine/root,upperdir=/changes/upper,workdir=/changes/work overlay /new ||
	give_up "no overlay"

cd /new || give_up "no root"
modules=$(setting modules)
release=$($bb uname -r)
$bb mount -t proc proc proc
$bb mount -t sysfs sys sys
$bb mount --move /dev dev
$bb mkdir -p dev/pts dev/shm
$bb mount -t devpts -o mode=620,ptmxmode=666 devpts dev/pts
$bb mount -t tmpfs tmpfs dev/shm
$bb mount -t tmpfs tmpfs run
$bb mount -t cgroup2 none sys/fs/cgroup
$bb mount -t bpf bpf sys/fs/bpf
$bb mount -t tracefs none sys/kernel/tracing
$bb mount -t debugfs none sys/kernel/debug
$bb mkdir -p run/lock run/netns run/weir-guest out "usr/lib/modules/$release"
$bb mount --bind /machine/out out
$bb mount --bind "/machine/root$modules" "usr/lib/modules/$release"
$bb ip link set lo up
$bb hostname guest
$bb cp /bin/busybox /run.sh run/weir-guest/
exec $bb switch_root /new /run/weir-guest/busybox sh /run/weir-guest/run.sh
