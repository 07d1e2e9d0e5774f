"""The kernels of gpt-oss as schedulable TIR, each defined once and without a target."""
