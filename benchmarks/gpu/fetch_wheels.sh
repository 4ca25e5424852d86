#!/usr/bin/env bash
# All wheels that a GPU machine without a network lacks, one version each, for CPython 3.12 on x86-64: 13 files, 8 MiB.
# Run it where there is a package index (any Python with pip, and one with setuptools for DeepSpeed's source release).
#
#   benchmarks/gpu/fetch_wheels.sh [DIR]        DIR: .gpu/whl, where make gpu looks
#
# Taken as there already: numpy, scipy, torch, triton, einops, msgpack, ninja, psutil, py-cpuinfo, pyyaml, rich,
# safetensors, tensorboard, tqdm, protobuf, nvidia-ml-py, pytest, pytest-timeout, matplotlib, setuptools, pillow, six.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
out="${1:-$root/.gpu/whl}"
python="${PYTHON:-python3}"
mkdir -p "$out"
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PIP_FIND_LINKS || true

get() {
    "$python" -m pip download -q --no-deps --only-binary=:all: --constraint "$root/constraints.txt" \
        --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --platform manylinux1_x86_64 --platform any -d "$out" "$@"
}

get megatron-core webdataset omegaconf pyfaidx                                   # as in constraints.txt
get braceexpand==0.1.7                                                           # for webdataset
get hjson==3.1.0 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0   # for DeepSpeed
get typing-inspection==0.4.5 typing-extensions==4.16.0 packaging==26.4           # the releases that pydantic asks for

# DeepSpeed has a source release only: a wheel of its Python files, no operator is compiled (DS_BUILD_OPS=0). The build
# imports torch if it is there and does not need it.
if ! compgen -G "$out/deepspeed-*.whl" > /dev/null; then
    build=("$python" -m pip wheel -q --no-deps --no-binary deepspeed --constraint "$root/constraints.txt" -w "$out" deepspeed)
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "${build[@]}" --no-build-isolation || DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "${build[@]}"
fi

wrong="$(find "$out" -mindepth 1 -printf '%f\n' | grep -v -E 'py3-none-any|cp312-.*x86_64|cp3[0-9]*-abi3-.*x86_64' || true)"
[ -z "$wrong" ] || { echo "not for CPython 3.12 on x86-64: $wrong" >&2; exit 1; }
twice="$(find "$out" -mindepth 1 -printf '%f\n' | sed 's/-[0-9].*//' | sort | uniq -d)"
[ -z "$twice" ] || { echo "two versions of $twice: remove one" >&2; exit 1; }
echo "$out: $(find "$out" -mindepth 1 -printf '%f\n' | wc -l) wheels, $(du -sk "$out" | cut -f1) KiB"
