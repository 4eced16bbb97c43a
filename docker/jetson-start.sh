#!/bin/sh
# jetson-start MODEL [serve's options]: builds MODEL's engines where they are missing, then serves it.
# VEGA_EDGE_BUILD: more of build's options, such as "--static". What serve would refuse is told before minutes of building.
set -eu
model=$1
shift
set -- --host 0.0.0.0 --engine tensorrt --preload "$model" "$@"

run() { # tells its child of `docker stop`: a container's first process gets only signals that it has a trap for
    vega-edge "$@" &
    trap 'kill -TERM $! && wait $!; exit 143' TERM INT
    wait $!
}

run serve "$@" --check
# shellcheck disable=SC2086 # options, one word each
run build "$model" --engine tensorrt ${VEGA_EDGE_BUILD:-}
exec vega-edge serve "$@"
