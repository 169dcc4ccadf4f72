"""Native code for CPUs: C++ in `src`, compiled at its first use and called through `jax.ffi`.

`build` compiles and keeps the library, `library` loads it and says what hinders it, `calls` has the
functions. It computes on integers alone, for inference: nothing here has a gradient.
"""
