"""What executes an artifact's functions: TVM's virtual machine, OpenCL, or NVIDIA's driver."""
