"""Measure the candidates of kernels that `osscompile/tuning/` made, without the compiler."""
