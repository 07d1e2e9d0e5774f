"""The instruction sets with a product of bytes, named as in `Target.int8_dot`."""

from . import dpbusd, maddubs, sdot, smmla

INSTRUCTIONS = {"maddubs": maddubs, "dpbusd": dpbusd, "sdot": sdot, "smmla": smmla}
