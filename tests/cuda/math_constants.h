// What TVM's sources use of this header of CUDA.
#define CUDART_INF_F __builtin_inff()
