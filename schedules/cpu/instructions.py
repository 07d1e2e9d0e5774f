"""The instruction sets with a product of bytes, by what `Target.int8_dot` calls them."""

from . import dpbusd, maddubs, sdot, smmla

INSTRUCTIONS = {"maddubs": maddubs, "dpbusd": dpbusd, "sdot": sdot, "smmla": smmla}
