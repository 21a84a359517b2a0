#!/bin/sh
# Installs the locked packages: sh deploy/install.sh [PYTHON [LOCK]]; the lock is requirements.txt beside this file,
# which is what a node needs.
#
# LDM_RAY_CUDA names another CUDA for torch than the lock's own, which is 13.0 and needs NVIDIA's driver 580 or newer:
# cu126 for drivers from 525 on, cpu for machines without a GPU. What is installed already is not looked at again.
set -eu
python=${1:-python}
lock=${2:-$(dirname "$0")/requirements.txt}
cuda=${LDM_RAY_CUDA:-}
mark="$("$python" -c 'import sys; print(sys.prefix)')/ldm_ray.lock"
wanted="$(sha256sum <"$lock") $cuda"
if [ "$(cat "$mark" 2>/dev/null)" = "$wanted" ]; then
  exit
fi
set --
if [ -n "$cuda" ]; then
  case $cuda in
    cpu | cu[0-9][0-9][0-9]) ;;
    *)
      echo "LDM_RAY_CUDA is cpu, or a CUDA such as cu126; not $cuda" >&2
      exit 2
      ;;
  esac
  # torch itself names the CUDA libraries that it was built with
  other=$(mktemp)
  trap 'rm -f "$other"' EXIT
  sed -E -e "s/^(torch|torchvision)==([0-9.]+)/\1==\2+$cuda/" -e '/^(nvidia-|cuda-|triton==)/d' "$lock" >"$other"
  lock=$other
  set -- --extra-index-url "https://download.pytorch.org/whl/$cuda"
fi
"$python" -m pip install --disable-pip-version-check --quiet -r "$lock" "$@"
echo "$wanted" >"$mark"
