#!/bin/sh
# Puts compilers for accelerators that are not in this machine into .venv/accelerators: libtpu, Triton, jax-triton and
# jax's CUDA plugin, at the versions of constraints.txt. Apart from .venv itself, because jax would look for a TPU
# wherever libtpu can be imported: only what is started with PYTHONPATH=.venv/accelerators sees them.
set -eu
cd "$(dirname "$0")/.."

target=.venv/accelerators
stamp=$target/.jaxinfer-installed
packages="libtpu triton jax-triton jax-cuda13-plugin"
up_to_date="$(cat constraints.txt scripts/setup_accelerators.sh | cksum) $(.venv/bin/python -V)"
[ "$(cat "$stamp" 2>/dev/null || :)" != "$up_to_date" ] || exit 0

printf 'setup: installing %s into %s (1.4 GB)\n' "$packages" "$target" >&2
rm -rf "$target"
if .venv/bin/python -m pip --version >/dev/null 2>&1; then
  # shellcheck disable=SC2086 # one word per package
  .venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile --no-deps --constraint constraints.txt \
    --target "$target" $packages
else
  # shellcheck disable=SC2086
  uv pip install --quiet --python .venv/bin/python --no-deps --constraint constraints.txt --target "$target" $packages
fi
printf '%s\n' "$up_to_date" >"$stamp"
