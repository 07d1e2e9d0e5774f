"""What measures candidates of kernels, made by `osscompile/tuning/`, without the compiler."""
