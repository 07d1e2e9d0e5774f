"""Turn scheduled kernels into code: a library, or OpenCL C or machine code and its launches."""
