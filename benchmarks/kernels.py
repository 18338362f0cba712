"""Times each generated kernel against what torch offers for the same work, on one CUDA GPU.

    python benchmarks/kernels.py --out kernels.json --plot roofline.png
    python benchmarks/kernels.py --only topk scan

Prints microseconds a call, bytes that must be read, and the share of what this chip was measured to do in the
same run; every result is checked in the same run. bfloat16.
"""

import sys

# Nothing else at the top: transformers looks for a package called kernels, and may find this file.
if __name__ == "__main__":
    from kernel_times import main

    sys.exit(main())
