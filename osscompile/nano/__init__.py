"""A tiny trained gpt-oss that ships with the package, and the scripts that trained it."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Hugging Face checkpoint folder of nano: config, tokenizer and MXFP4 weights."""
