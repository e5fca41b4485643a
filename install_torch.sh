#!/bin/sh
# sh install_torch.sh PYTHON: torch for this machine, never gigabytes of CUDA where there is no GPU.
#
# A plain "pip install torch" takes the CUDA build on Linux. The local version label +cpu exists only for the
# CPU build, so asking for it by name cannot bring anything else, wherever pip looks.
set -eu
python=$1
version=2.13.0

if "$python" -c 'import sys
from importlib.metadata import version
major, minor = version("torch").split(".")[:2]
sys.exit(not (2, 11) <= (int(major), int(minor)) < (2, 14))' 2>/dev/null; then
    exit 0
fi
if nvidia-smi --list-gpus >/dev/null 2>&1; then
    echo "installing torch with CUDA: there is a GPU here"
    exec "$python" -m pip install --quiet "torch>=2.11,<2.14"
fi
if [ "$(uname -s)" != Linux ]; then
    exec "$python" -m pip install --quiet "torch==$version" # no CUDA build exists elsewhere
fi
echo "installing the CPU build of torch: no GPU here"
"$python" -m pip install --quiet "torch==$version+cpu" 2>/dev/null || exec "$python" -m pip install --quiet \
    "torch==$version+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
