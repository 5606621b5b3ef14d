#!/bin/sh
# Prints a Python of at least 3.12: $PYTHON, then the PATH, then pyenv's versions; says what is missing when there is none.
good() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }
for python in "$PYTHON" python3.13 python3.12 python3.14 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
  if [ -n "$python" ] && good "$python"; then
    echo "$python"
    exit 0
  fi
done
echo "cacheclip-jax needs Python 3.12 or newer with the venv module, and found none on the PATH or in pyenv." >&2
echo "Install one (for example: pyenv install 3.12, or your system's python3.12 and python3.12-venv), or name one:" >&2
echo "  make test PYTHON=/path/to/python3.12" >&2
exit 1
