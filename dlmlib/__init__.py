"""Diffusion language models: one network, one decoding loop, small policies."""
