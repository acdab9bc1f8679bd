#!/usr/bin/env bash
# Trains in two processes that reach each other only over a network: two namespaces with a cable between them stand for two
# hosts. Needs root, ip (iproute2), Open MPI, and a lapidary built with the feature mpi.
#
#   scripts/mpi_two_hosts.sh target/release/lapidary train model_name=tiny-e2b run_name=mine steps=10 per_device_batch_size=4 ...
set -euo pipefail
[ "$#" -ge 2 ] || { sed -n '2,6p' "$0" >&2; exit 2; }
binary=$(realpath "$1"); shift

agent=$(mktemp)
end() {
    ip netns del lapidary1 2>/dev/null || true
    ip netns del lapidary2 2>/dev/null || true
    rm -f "$agent"
}
trap end EXIT
for i in 1 2; do ip netns add "lapidary$i"; done
ip link add lap1 netns lapidary1 type veth peer name lap2 netns lapidary2
for i in 1 2; do
    ip -n "lapidary$i" addr add "10.77.0.$i/24" dev "lap$i"
    ip -n "lapidary$i" link set "lap$i" up
    ip -n "lapidary$i" link set lo up
done

# What ssh would be between hosts: the launcher hands it a host and a command.
cat > "$agent" <<'AGENT'
#!/bin/sh
host=$1; shift
n=${host##*.}
exec ip netns exec "lapidary$n" unshare --uts sh -c "hostname lapidary$n; $*"
AGENT
chmod +x "$agent"

ip netns exec lapidary1 unshare --uts sh -c 'hostname lapidary1; exec "$@"' sh \
    mpirun --allow-run-as-root -n 2 --host 10.77.0.1:1,10.77.0.2:1 --wdir "$PWD" --mca plm_rsh_agent "$agent" \
    --mca btl tcp,self --mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 \
    "$binary" "$@"
