// The part of this header of CUDA that TVM's sources use.
#define CUDART_INF_F __builtin_inff()
