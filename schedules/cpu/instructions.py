"""The instruction sets with a product of bytes, named as in `Target.int8_dot`."""

from . import dpbusd, maddubs, psign, sdot, smmla

INSTRUCTIONS = {"maddubs": maddubs, "dpbusd": dpbusd, "sdot": sdot, "smmla": smmla}
# for a few rows of activations, which do not repay that weights are rearranged
FOR_FEW = INSTRUCTIONS | {"maddubs": psign, "smmla": sdot}
