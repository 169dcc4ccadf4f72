"""What tests of kernels for TPUs share."""

import os

from hypothesis import Phase, settings

# Drawn shapes of a kernel: few, as each is compiled; a few hundred where there is time:
# QUWEIT_KERNEL_DRAWS=300. What fails is not made smaller, which would take hours.
drawn = settings(
    deadline=None,
    max_examples=int(os.environ.get("QUWEIT_KERNEL_DRAWS", 4)),
    derandomize=True,
    phases=[Phase.generate],
)
