"""Device kernels in the CuTe DSL; imported only when an operator's call can use one."""
