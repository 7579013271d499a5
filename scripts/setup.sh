#!/bin/sh
# Makes .venv in the repository root with the project (editable) and everything its demo, tests and checks need, at the
# versions of constraints.txt. Does nothing when .venv is up to date; `make` calls it before every other target.
#   make setup PYTHON=/path/to/python3.12    picks the interpreter
#   make setup EXTRAS=cuda13                 adds an extra of pyproject.toml, which later calls keep
set -eu
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.jaxinfer-installed   # what the finished environment was made from
marker=$venv/.jaxinfer-unfinished # there while a setup works on it, with its process id; left over, it means: start again
kept=$venv/.jaxinfer-extras
wanted="Python 3.12, 3.13 or 3.14"
is_wanted='import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 14))'

say() { printf 'setup: %s\n' "$*" >&2; }

# usable PYTHON: runs, has a version we want, and can make environments (Debian's python3 without python3-venv cannot).
usable() {
  "$1" -c "$is_wanted" >/dev/null 2>&1 && { [ -n "$uv" ] || "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }
}

# try COMMAND: prints the interpreter's own path (not that of a shim or of an active environment) if it is usable.
try() {
  usable "$1" && "$1" -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)'
}

find_uv() {
  for candidate in uv "${HOME:-/nonexistent}/.local/bin/uv" "${HOME:-/nonexistent}/.cargo/bin/uv"; do
    if "$candidate" --version >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON" && return
    say "PYTHON=$PYTHON is not a usable interpreter: $wanted is needed; looking further"
  fi
  for name in python3.12 python3.13 python3.14 python3 python; do
    try "$name" && return
  done
  for root in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null || :)" "${HOME:-/nonexistent}/.pyenv"; do
    [ -n "$root" ] || continue
    for candidate in "$root"/versions/3.12*/bin/python "$root"/versions/3.13*/bin/python "$root"/versions/3.14*/bin/python; do
      try "$candidate" && return
    done
  done
  [ -n "$uv" ] || return 1
  for version in 3.12 3.13 3.14; do
    found=$("$uv" python find --system --no-project "$version" 2>/dev/null) && try "$found" && return
  done
  say "no $wanted here; asking uv to install Python 3.12"
  "$uv" python install --no-bin 3.12 >&2 && found=$("$uv" python find --system --no-project 3.12) && try "$found"
}

give_up() {
  say "no usable $wanted found. Looked for:"
  say "  \$PYTHON (${PYTHON:-not set})"
  say "  python3.12, python3.13, python3.14, python3, python on PATH (python3 is $(python3 -V 2>/dev/null || echo missing))"
  say "  pyenv's versions in ${PYENV_ROOT:-~/.pyenv}"
  if [ -n "$uv" ]; then
    say "  uv ($uv), which has none and could not install one (see above)"
  else
    say "  uv (not on PATH, in ~/.local/bin or in ~/.cargo/bin), which could install one"
  fi
  say "Install one of these (on Debian or Ubuntu also python3-venv), or name one: make setup PYTHON=/path/to/python3.12"
  exit 1
}

install() { # with uv where there is one, else, or if that fails (it does not read pip's configuration), with pip
  if [ -n "$uv" ]; then
    "$uv" pip install --quiet --python "$venv/bin/python" --constraint constraints.txt "$@" && return
    say "uv could not install; trying pip"
    uv=""
    "$venv/bin/python" -m ensurepip >/dev/null
  fi
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile --constraint constraints.txt "$@"
}

builder=$(cat "$marker" 2>/dev/null || :)
if [ -n "$builder" ] && kill -0 "$builder" 2>/dev/null; then
  say "waiting for the setup that process $builder runs (if it is something else: remove $venv)"
  while [ -e "$marker" ] && kill -0 "$builder" 2>/dev/null; do sleep 1; done
fi

# The stamp says what .venv depends on; an environment cannot be moved, so its place is a part of that.
extras=dev${EXTRAS:+,$EXTRAS}
[ -n "${EXTRAS:-}" ] || extras=$(cat "$kept" 2>/dev/null || echo dev)
up_to_date="$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum) $extras $(pwd -P)"
if [ ! -e "$marker" ] && [ "$(cat "$stamp" 2>/dev/null || :)" = "$up_to_date" ] && "$venv/bin/python" -c "$is_wanted" 2>/dev/null; then
  exit 0
fi

uv=$(find_uv)
keep=no # an environment that works, finished in this place, is only updated
if [ ! -e "$marker" ] && "$venv/bin/python" -c "$is_wanted" 2>/dev/null; then
  case "$(cat "$stamp" 2>/dev/null || echo " $(pwd -P)")" in *" $(pwd -P)") keep=yes ;; esac
fi

if [ "$keep" = yes ]; then
  say "updating $venv"
  echo $$ >"$marker"
  rm -f "$stamp"
  [ -n "$uv" ] || "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
else
  python=$(find_python) || give_up
  say "making $venv with $python ($("$python" -V)); this takes a minute or two"
  rm -rf "$venv"
  mkdir "$venv"
  echo $$ >"$marker"
  if [ -n "$uv" ]; then
    "$uv" venv --quiet --no-project --allow-existing --python "$python" "$venv"
  else
    "$python" -m venv "$venv"
  fi
fi
install hatchling editables # the build back end, so that the next step needs no environment of its own
install --no-build-isolation --editable ".[$extras]"
printf '%s\n' "$extras" >"$kept"
printf '%s\n' "$up_to_date" >"$stamp"
rm -f "$marker"
say "done: $("$venv/bin/python" -V) in $venv"
