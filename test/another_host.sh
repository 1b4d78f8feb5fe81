#!/bin/sh
# Stands in for ssh in test_hosts.py: HOST COMMAND... runs here, by a shell as ssh's would, under that host's name.
host=$1
shift
exec unshare --uts sh -c 'hostname "$0"; exec sh -c "$1"' "$host" "$*"
