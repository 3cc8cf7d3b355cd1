#!/bin/sh
# check_aarch64.sh FOLDER: compiles the kernel library for 64-bit Arm with Debian's cross compiler. There the scalar
# variants are all there is: the files of x86 instruction sets are left out, and the dispatch tables must not name them.
set -e
if ! command -v aarch64-linux-gnu-g++ >/dev/null; then
  echo "aarch64-linux-gnu-g++ is missing; on Debian or Ubuntu: sudo apt install g++-aarch64-linux-gnu" >&2
  exit 1
fi
cmake -S "$(dirname "$0")/.." -B "$1" -G Ninja -DPYFASTPEFT_KERNELS_ONLY=ON -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
cmake --build "$1"
# nothing may be left that another file of the library should have defined
undefined=$(aarch64-linux-gnu-nm --demangle "$1/libpyfastpeft_kernels.a" 2>/dev/null |
  awk '/ U pyfastpeft::/ { sub(/.* U /, ""); wanted[$0] = 1 } / [TWVBDR] pyfastpeft::/ { sub(/^[0-9a-f]* . /, ""); have[$0] = 1 }
       END { for (name in wanted) if (!(name in have)) print name }')
if [ -n "$undefined" ]; then
  echo "undefined on aarch64 (guard the dispatch table with #if defined(__x86_64__)):" >&2
  echo "$undefined" >&2
  exit 1
fi
