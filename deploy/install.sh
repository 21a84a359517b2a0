#!/bin/sh
# Installs the locked packages: sh deploy/install.sh [PYTHON [LOCK]]; the lock is requirements.txt beside this file,
# which is what a node needs.
#
# LDM_RAY_CUDA is the address of PyTorch's packages for another CUDA than the lock's own, which is 13.0 and needs NVIDIA's
# driver 580 or newer. PyTorch's page on installing shows it; it ends in cu126 (drivers from 525 on) or
# the like, or in cpu for machines without a GPU. What is installed already is not looked at again.
set -eu
python=${1:-python}
lock=${2:-$(dirname "$0")/requirements.txt}
cuda=${LDM_RAY_CUDA:-}
mark="$("$python" -c 'import sys; print(sys.prefix)')/ldm_ray.lock"
wanted="$(sha256sum <"$lock") $cuda"
if [ "$(cat "$mark" 2>/dev/null)" = "$wanted" ]; then
  exit
fi
if [ -n "$cuda" ]; then
  case $cuda in
    http*://*/cpu | http*://*/cu[0-9][0-9][0-9]) ;;
    *)
      echo "LDM_RAY_CUDA is the address of PyTorch's packages for a CUDA, ending in cpu or in cu126 or the like; not $cuda" >&2
      exit 2
      ;;
  esac
  # torch itself names the CUDA libraries that it was built with
  other=$(mktemp)
  trap 'rm -f "$other"' EXIT
  sed -E -e "s/^(torch|torchvision)==([0-9.]+)/\1==\2+${cuda##*/}/" -e '/^(nvidia-|cuda-|triton==)/d' "$lock" >"$other"
  lock=$other
  export PIP_EXTRA_INDEX_URL="$cuda"
fi
"$python" -m pip install --disable-pip-version-check --quiet -r "$lock"
echo "$wanted" >"$mark"
