#!/bin/sh
# check_memory.sh address|thread|valgrind FOLDER: builds the CPU kernels and the programs of tests/native in FOLDER and
# runs them under AddressSanitizer and UndefinedBehaviorSanitizer, ThreadSanitizer, or valgrind's memcheck. valgrind knows
# no AVX-512 and shows the kernels a machine that has none: AVX2 is the most it runs.
set -e
case "$1" in
  address) flags="-g -fsanitize=address,undefined -fno-sanitize-recover=all" ;;
  thread) flags="-g -fsanitize=thread" ;;
  valgrind)
    flags="-g"
    if ! command -v valgrind >/dev/null; then
      echo "valgrind is missing; on Debian or Ubuntu: sudo apt install valgrind" >&2
      exit 1
    fi ;;
  *)
    echo "usage: check_memory.sh address|thread|valgrind FOLDER" >&2
    exit 2 ;;
esac
root="$(cd "$(dirname "$0")/.." && pwd)"
cmake -S "$root" -B "$2" -G Ninja -DPYFASTPEFT_KERNELS_ONLY=ON -DCMAKE_CXX_FLAGS="$flags" >/dev/null
cmake --build "$2" >/dev/null
for program in cpu_kernels optimizer_state; do
  # the library's functions have hidden visibility, which a program linked to it statically may call
  ${CXX:-g++} -std=c++17 -O1 -Wall -Wextra -ffp-contract=off $flags -I"$root/csrc" "$root/tests/native/$program.cpp" \
    "$2/libpyfastpeft_kernels.a" -pthread -o "$2/$program"
  if [ "$1" = valgrind ]; then
    valgrind --quiet --error-exitcode=1 --leak-check=full "$2/$program" "$2"
  else
    "$2/$program" "$2"
  fi
done
