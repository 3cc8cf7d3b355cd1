#!/bin/sh
# check_prerequisites.sh PYTHON: says plainly what a fresh machine lacks before pip and CMake say it at length.
python=${1:-python3}
name=$(basename "$python")
missing=""
packages=""
lacks() { # lacks WHAT PACKAGE
  missing="$missing
  - $1"
  packages="$packages $2"
}

if ! command -v "$python" >/dev/null 2>&1; then
  lacks "$python (Python 3.10 or newer)" "$name $name-venv $name-dev"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  lacks "Python 3.10 or newer: $python is $("$python" --version 2>&1); name another one by make PYTHON=..." \
    "python3.12 python3.12-venv python3.12-dev"
else
  "$python" -c 'import ensurepip, venv' 2>/dev/null || lacks "$python's module venv" "$name-venv"
  "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    lacks "Python.h, the headers of $python" "$name-dev"
fi
command -v "${CXX:-g++}" >/dev/null 2>&1 || lacks "${CXX:-g++}, the C++ compiler (g++ 11 or newer)" "g++"

if [ -n "$missing" ]; then
  echo "pyfastpeft cannot be built yet; missing:$missing" >&2
  echo "On Debian or Ubuntu:" >&2
  echo "  sudo apt install$packages" >&2
  exit 1
fi
