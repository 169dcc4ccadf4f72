"""The fast forms of what `ops` computes, and how one is chosen.

A function of `ops` that has several implementations takes `implementation=`: None for the fastest
that works where it runs, or one of

  reference  plain jax.numpy, written to be read; what the others are tested against
  xla        jax.numpy, written for the compiler; anywhere
  native     C++ on a CPU, compiled at its first use
  pallas     a kernel for TPUs or GPUs

Asking for one that a platform lacks is an error that names what it has: nothing falls back in
silence.
"""
