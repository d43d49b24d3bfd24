"""The CUDA kernels' machine code, looked at without a GPU: what is launched, what it compiles to, what a warp of it issues.

toolkit  where nvcc and nvdisasm are, and one kernel compiled and disassembled
code     a listing as instructions with their control codes, basic blocks and loops
calls    which kernels an edit or a step launches on a device, with which arguments: the host code itself is asked
warp     one warp's way through a kernel with such arguments: instructions issued, and an estimate of its time alone
shared   what of a CTA's shared memory such a way depends on; registers, values, alu, floats: what instructions write
tiles    what one tile costs a warp; checks: what a kernel is held to
"""
