# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=dash
# Runs /out/command on the machine's files, sends its output to the second serial line, leaves
# its exit status in /out/status and switches the guest off.
bb=/run/weir-guest/busybox
export HOME=/root TERM=dumb LANG=C.UTF-8

$bb stty -F /dev/ttyS1 raw
$bb mkfifo /run/weir-guest/output
$bb cat /run/weir-guest/output >/dev/ttyS1 &
copier=$!
$bb touch /out/started
$bb setsid /bin/sh /out/command </dev/null >/run/weir-guest/output 2>&1
status=$?
# A process that the command left behind may hold the pipe open: do not wait for it for long.
turn=0
while [ -d /proc/$copier ] && [ $turn -lt 10 ]; do
	$bb usleep 100000
	turn=$((turn + 1))
done
$bb dmesg >/out/dmesg
echo $status >/out/status.partial
$bb mv /out/status.partial /out/status
$bb reboot -f
