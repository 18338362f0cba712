"""Builds run_package.cpp against the libraries of the torch that is installed; needs g++ and no CUDA.

python examples/cpp/build.py run_package
"""

import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

SOURCE = Path(__file__).with_name("run_package.cpp")


def build(target: Path) -> None:
    """Compiles and links the runner. Raises CalledProcessError when that fails."""
    libraries = Path(torch.__file__).parent / "lib"
    command = ["g++", "-std=c++20", "-O0", str(SOURCE), "-o", str(target)]
    command += [f"-I{path}" for path in include_paths()]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-Wl,--no-as-needed"]
    command += ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)


def main() -> None:
    """Builds the runner where the first argument says."""
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "run_package"))


if __name__ == "__main__":
    main()
