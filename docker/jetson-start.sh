#!/bin/sh
# jetson-start MODEL [serve's options]: builds MODEL's engines where they are missing, then serves it.
set -eu
model=$1
shift
vega-edge build "$model" --engine tensorrt
exec vega-edge serve --host 0.0.0.0 --engine tensorrt --preload "$model" "$@"
