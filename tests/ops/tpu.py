"""What tests of kernels for TPUs share."""

import os

# Drawn shapes of a kernel; a few hundred where there is time: QUWEIT_KERNEL_DRAWS=300.
DRAWS = int(os.environ.get("QUWEIT_KERNEL_DRAWS", 4))
