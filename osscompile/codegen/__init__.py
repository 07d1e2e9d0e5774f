"""From scheduled kernels to code: a library, or OpenCL C or machine code and what launches it."""
