"""Pallas kernels for NVIDIA's GPUs, through Triton.

Each is tested in interpret mode against the reference and compiled for Hopper GPUs ahead of time;
none has run on a GPU yet. Their arrays are flat: a kernel makes the places of what it reads and
writes itself, and masks what is past an end.
"""
