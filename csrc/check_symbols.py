"""check_symbols.py STAMP kernels.ISA.DTYPE.o ...: one instruction set's code must not leak.

The linker keeps one copy of a weak symbol that several objects define. If AVX-512's copy of some
inline function is the one it keeps, the baseline kernels call it, and the library dies of an
illegal instruction on an older machine. So every weak or unique symbol that an object of the
kernels defines must carry its instruction set's name, which its namespace gives it.
"""

import shutil
import subprocess
import sys
from pathlib import Path

# nm's letters for definitions that the linker may merge with another object's.
MERGED = ("W", "V", "u")
# A pointer to the C++ run time's exception handler, the same in every object.
HARMLESS = ("DW.ref.__gxx_personality_v0",)


def leaks(objects: list[Path]) -> list[str]:
    nm = subprocess.run(
        ["nm", "--defined-only", "--format=posix", "--print-file-name", *objects],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = []
    for line in nm.stdout.splitlines():
        name, symbol, kind = line.split()[:3]
        path = Path(name.rstrip(":"))
        isa = path.name.split(".")[1]
        if kind in MERGED and isa not in symbol and symbol not in HARMLESS:
            found.append(f"{path.name}: {symbol}")
    return found


def main() -> None:
    stamp, objects = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    if shutil.which("nm") is None:
        print("fused_rnn: nm was not found (Debian: binutils): instruction sets are not checked.")
    elif found := leaks(objects):
        sys.exit(
            "fused_rnn: these symbols are shared between the builds for different instruction "
            "sets, so one could call another's code; put them into the instruction set's "
            "namespace, or inline them (c++filt prints them as C++):\n" + "\n".join(found)
        )
    stamp.touch()


if __name__ == "__main__":
    main()
