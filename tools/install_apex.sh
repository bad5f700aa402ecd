#!/usr/bin/env bash
# Build NVIDIA's apex with the CUDA extensions that the plugin `kernels` uses, for the torch that is installed.
#
#   tools/install_apex.sh [--check]
#
# PYTHON (default: python) names the interpreter, APEX_REF a commit or tag of github.com/NVIDIA/apex (default: master),
# MAX_JOBS how many compilers run at once. Where the extensions are there already nothing is done. With --check nothing
# is changed. Exit status: 0 built or there, 1 the build failed, 2 it cannot be built here.
set -euo pipefail

python=${PYTHON:-python}
ref=${APEX_REF:-master}

refuse() {
  echo "error: $1. Fix: $2" >&2
  exit 2
}

command -v "$python" >/dev/null || refuse "there is no '$python'" "set PYTHON to the interpreter that trains"
"$python" -c 'import torch' 2>/dev/null || refuse "$python has no torch" "install it first: apex is built against it"

torch_cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")')
torch_version=$("$python" -c 'import torch; print(torch.__version__)')
[ -n "$torch_cuda" ] || refuse "torch $torch_version is built without CUDA" "install a torch that is built with CUDA"

if "$python" -c 'import torch, amp_C, fused_layer_norm_cuda' 2>/dev/null; then
  echo "NVIDIA's apex is there, with its CUDA extensions (torch $torch_version, CUDA $torch_cuda)"
  exit 0
fi

nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
command -v "$nvcc" >/dev/null || refuse "there is no CUDA compiler ($nvcc)" \
  "install the CUDA toolkit $torch_cuda, and set CUDA_HOME to its folder"
nvcc_cuda=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p')
# Between minor versions of one CUDA binaries fit; between major ones they do not.
[ "${nvcc_cuda%%.*}" = "${torch_cuda%%.*}" ] || refuse \
  "$nvcc is CUDA ${nvcc_cuda:-of unknown version}, and torch $torch_version is built with CUDA $torch_cuda" \
  "install the CUDA toolkit $torch_cuda, or a torch that is built with CUDA $nvcc_cuda"
command -v git >/dev/null || refuse "there is no git" "install it"

if "$python" -m pip show apex >/dev/null 2>&1; then
  refuse "a package called apex is installed, without NVIDIA's extensions" "$python -m pip uninstall apex"
fi

if [ "${1:-}" = "--check" ]; then
  echo "apex can be built here: torch $torch_version, CUDA $torch_cuda, $nvcc $nvcc_cuda"
  exit 0
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone --quiet --filter=blob:none https://github.com/NVIDIA/apex "$folder/apex"
git -C "$folder/apex" checkout --quiet "$ref"
# Older revisions read the options of pip, newer ones the variables.
APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "$python" -m pip install --verbose --no-cache-dir --no-build-isolation --no-deps \
  --config-settings "--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext" "$folder/apex"
"$python" -c 'import torch, amp_C, fused_layer_norm_cuda' || {
  echo "error: apex was installed, and its CUDA extensions cannot be imported" >&2
  exit 1
}
echo "NVIDIA's apex is built: camshaft doctor shows it"
