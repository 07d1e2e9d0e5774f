// TVM includes this header of CUDA, but uses nothing from it.
