#!/usr/bin/env bash
# The kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer: tests/sanitize.sh [PYTHON] [pytest arguments]
#
# A compiler that adds the flags stands in for the real one, and a cache of its own keeps what it builds. Python itself is
# not built with the sanitizer, so its runtime is loaded first; leaks are Python's and not looked for.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
shift || true
real=${CXX:-$(command -v g++ || command -v clang++)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/sanitizing-c++" <<SCRIPT
#!/bin/sh
[ "\$1" = --version ] && { $real --version; echo sanitized; exit; }
exec $real "\$@" -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
SCRIPT
chmod +x "$work/sanitizing-c++"
export CXX="$work/sanitizing-c++" XDG_CACHE_HOME="$work" HYPOTHESIS_STORAGE_DIRECTORY="$work/hypothesis"
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
preload="$($real -print-file-name=libasan.so) $($real -print-file-name=libstdc++.so)"
calculating="encodes or mixed or guess or filter or equals or zero or selects or selected or integers or score or search or cascade or stage or documents or ties"
LD_PRELOAD="$preload" "$python" -m pytest -v -p no:cacheprovider tests/test_scoring.py tests/retrieval/test_cascade.py \
    tests/retrieval/test_cpu_kernel.py -k "($calculating) and not compiler and not prints and not tuning" "$@"
