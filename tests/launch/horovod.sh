#!/usr/bin/env bash
# Builds Horovod and trains two tiny runs, under `horovodrun` and under `torchrun`: their checkpoints must be equal.
#
#   tests/launch/horovod.sh FOLDER        needs `make .venv/test`, a C++20 compiler, CMake, PyPI and five to fifteen minutes
#
# On demand, not in CI. FOLDER gets a virtual environment that sees the packages of this checkout's .venv, so Horovod is
# built against the PyTorch that the program runs with. Started again, it does not build again. MAKEFLAGS=-j1 is kind to others.
set -euo pipefail
folder=$(mkdir -p "${1:?usage: tests/launch/horovod.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
base=$PWD/.venv/bin/python
python=$folder/venv/bin/python
version=0.28.1

if ! "$python" -c 'import horovod.torch' 2>/dev/null; then
    "$base" -m venv "$folder/venv"
    packages=$("$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$packages')" >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"

    "$python" -m pip install --quiet 'setuptools>=64' wheel
    "$python" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest "$folder" "horovod==$version"
    tar -xzf "$folder/horovod-$version.tar.gz" -C "$folder"
    source=$folder/horovod-$version
    # Its CMake files ask for C++14; PyTorch's headers need C++17 since 2.1, and C++20 by 2.15.
    sed -i 's/set(CMAKE_CXX_STANDARD 1[47])/set(CMAKE_CXX_STANDARD 20)/' "$source/CMakeLists.txt" "$source/horovod/torch/CMakeLists.txt"
    # It takes a CUDA build of PyTorch and an `nvcc` for a wish to compile CUDA code. Here only its CPU side is used.
    sed -i 's/(CUDA_HOME is not None)/False/' "$source/cmake/Modules/FindPytorch.cmake"
    HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
        MAKEFLAGS=${MAKEFLAGS:--j$(nproc)} "$python" -m pip install --no-build-isolation "$source"
fi
"$python" -c 'import horovod, torch; print("Horovod", horovod.__version__, "on PyTorch", torch.__version__)'

export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1
rm -rf "$folder/world" "$folder/runs"
mapfile -t flags < <("$python" -m tests.launch.tiny_world "$folder/world")
"$folder/venv/bin/horovodrun" -np 2 --gloo "$python" train/train.py --horovod "${flags[@]}" --run_name "$folder/runs/horovod"
"$python" -m torch.distributed.run --standalone --nproc-per-node=2 train/train.py "${flags[@]}" --run_name "$folder/runs/torchrun"
"$python" -m tests.launch.tiny_world --same "$folder"/runs/{horovod,torchrun}/checkpoint_1.pt
