"""Pallas kernels for TPUs.

They hold in fast memory what the compiler would send through slow memory between operations, and
read rows whose numbers are data, which it would gather. Each is tested in interpret mode against
the reference and compiled for TPUs ahead of time; none has run on a TPU yet.
"""
