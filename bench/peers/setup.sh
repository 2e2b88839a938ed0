#!/bin/sh
# Get the peers: transformers into a virtual environment, llama.cpp built from the sources that
# llama-cpp-python carries, for this machine's instruction set. About ten minutes on two cores.
#   sh setup.sh FOLDER [BUILD_JOBS]
set -eu
folder=${1:?usage: sh setup.sh FOLDER [BUILD_JOBS]}
jobs=${2:-$(nproc)}
mkdir -p "$folder"
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.15.0 transformers==5.23.0 numpy safetensors sentencepiece cmake ninja scikit-build-core
venv/bin/pip download -q --no-deps --no-binary llama-cpp-python --no-build-isolation llama-cpp-python==0.3.36
tar xf llama_cpp_python-0.3.36.tar.gz
ln -sfn llama_cpp_python-0.3.36/vendor/llama.cpp llama.cpp
venv/bin/cmake -G Ninja -S llama.cpp -B llama-build -DCMAKE_MAKE_PROGRAM="$PWD/venv/bin/ninja" \
    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
venv/bin/cmake --build llama-build -j "$jobs" --target llama-batched-bench
echo "peers are in $folder; now: $folder/venv/bin/python run.py MOESAIC --peers $folder"
